"""Any network that predicts x0, eps, v or a flow's velocity, as a denoiser in EDM's convention."""

import torch
from torch import Tensor, nn

from ..preconditioning import PREDICTIONS
from ..schedules import FlowMatching, flow_time, interpolated_index, of_scheduler
from .precond import Preconditioned, index_argument, time_argument
from .unet import UNet


class _Called(nn.Module):
    """Another program's module, whose parameters are then under "module."."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.num_models = module, getattr(module, "num_models", 1)

    def forward(self, *args, **named):
        return self.module(*args, **named)


class Denoiser(Preconditioned):
    """D(x, sigma) of a module that predicts x0, eps, v or a velocity.

    The module is asked at a scaled x and a time of its own.

    EDM's state is x = x0 + sigma eps. The module sees x_t = alpha_t x0 + sigma_t eps = alpha_t x,
    where sigma_t = alpha_t sigma. On a variance-preserving path (DDPM) alpha_t^2 + sigma_t^2 = 1,
    so alpha_t = 1/sqrt(1 + sigma^2); on flow matching's, alpha_t = 1 - t and sigma_t = t, so t =
    sigma/(1 + sigma). `tdkern.preconditioning` has D for each prediction. At an infinite sigma,
    where alpha_t = 0, x is the unit noise eps: x_t itself.

    Args:
        module: called as `module(x_t, t)`, or `module(x_t, t, class_labels=index)` where class
            labels are given, with t [B] and index [B] int64; `EDMPrecond` says which names it may
            have for them. It returns F, a tuple that begins with it, or an object that has it as
            `sample`, as diffusers' models do. Of more channels than x has, the first are taken: the
            rest are a learned variance. Its parameters are then under "model.module.". `SongUNet`
            and `DhariwalUNet` are called as in the other wrappers, augment_labels too, and are
            under "model.".
        prediction: what F is: "x0", "eps", "v" or "velocity".
        alphas_cumprod: [T], alpha_t^2 at the times 0 .. T - 1 of a VP path, falling, between 0 and
            1, as a diffusers scheduler has it. t is then real: ln sigma is interpolated, and held
            at the ends. The last may be 0, zero terminal SNR, but not with "eps", which says
            nothing of x0 there. Not for "velocity".
        time_scale: a factor of t: for "velocity", whose t is sigma/(1 + sigma), 1000 for networks
            that count so.
        dtype: of the image inside the module; None is x's.

    Call it as `net(x, sigma, class_labels=None, augment_labels=None, **conditions) -> D`;
    class_labels are one-hot, [B, classes], or indices [B]. See `EDMPrecond`, which also says what
    `raw=True` gives and where gradients go.

    Raises:
        ValueError: an argument is not as said, or augment_labels are given to a module that takes
            none.
    """

    PREDICTIONS = ("x0", "eps", "v", "velocity")
    learned_variance = True
    log_sigmas: Tensor  # [T], of alphas_cumprod

    def __init__(
        self,
        module: nn.Module,
        prediction: str = "eps",
        *,
        alphas_cumprod=None,
        time_scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(module if isinstance(module, UNet) else _Called(module), dtype=dtype)
        self.index_argument, self.time_argument = index_argument(module), time_argument(module)
        if prediction not in self.PREDICTIONS:
            raise ValueError(
                f"Denoiser: prediction must be one of {', '.join(self.PREDICTIONS)}, got "
                f"{prediction!r}"
            )
        if (alphas_cumprod is None) != (prediction == "velocity"):
            needed = "None" if prediction == "velocity" else "given"
            raise ValueError(
                f"Denoiser: alphas_cumprod must be {needed} with prediction {prediction!r}"
            )
        self.prediction, self.time_scale = prediction, time_scale
        self.preconditioning = PREDICTIONS[prediction]
        self.sigma_min, self.sigma_max = 0.0, float("inf")
        if alphas_cumprod is not None:
            squares = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
            self._check_squares(squares)
            log_sigmas = (1 / squares - 1).log() / 2
            self.register_buffer("log_sigmas", log_sigmas, persistent=False)
            self.sigma_min, self.sigma_max = log_sigmas[0].exp().item(), log_sigmas[-1].exp().item()

    @classmethod
    def from_scheduler(cls, module: nn.Module, scheduler, **settings) -> "Denoiser":
        """A model of diffusers under the scheduler that it is trained and sampled with.

        Args:
            module: as above.
            scheduler: one with betas, such as diffusers' DDPMScheduler, or of flow matching; see
                `schedules.of_scheduler`.
            settings: the other arguments, such as `dtype`.

        Raises:
            ValueError: its levels or its prediction are none of these.
        """
        prediction, path = of_scheduler(scheduler)
        if isinstance(path, FlowMatching):  # its models take t T
            scale = {"time_scale": float(scheduler.config.num_train_timesteps)}
            return cls(module, prediction, **scale | settings)
        return cls(module, prediction, alphas_cumprod=path.alphas_cumprod, **settings)

    def _check_squares(self, squares: Tensor) -> None:
        if (
            squares.ndim != 1
            or len(squares) < 2
            or not (0 <= squares[-1] and squares[0] < 1 and (squares.diff() < 0).all())
        ):
            raise ValueError(
                "Denoiser: alphas_cumprod must be [T] falling numbers from below 1 to 0 or more, "
                f"got {list(squares.shape)} from "
                f"{squares.flatten()[:1].tolist()} to {squares.flatten()[-1:].tolist()}"
            )
        if squares[-1] == 0 and not self.preconditioning.reaches_noise:
            raise ValueError(
                f"Denoiser: prediction must be 'x0' or 'v' where alphas_cumprod ends in 0, as "
                f"{self.prediction} says nothing of x0 there, got {self.prediction!r}"
            )

    def input_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        noise = sigma.isinf()  # where x is the unit noise, which is x_t
        if self.prediction == "velocity":
            return torch.where(noise, 1.0, 1 / (1 + sigma)), self.time_scale * flow_time(sigma)
        t = interpolated_index(self.log_sigmas.to(sigma.dtype), sigma.log())
        return torch.where(noise, 1.0, (1 + sigma**2).rsqrt()), self.time_scale * t
