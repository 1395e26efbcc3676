"""Consistency training, alone and with a temporal-difference term."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.special import ndtr, ndtri

from .._cache import tensor_cache
from ..columns import SCALE, SCALE_P, SIGMA, SIGMA_P, SKIP, SKIP_P, W_BASE
from ..fields import flag
from ..ops import td_coef, td_loss
from ..ops._modes import can_check_values
from ..ops.td_coef import BASE_WEIGHTS, WEIGHTS
from ..preconditioning import CT
from ..schedules import EDM, ETA, eta_of
from .base import NO_TD, Loss, TDBatch, lambda_base_flag, per_sample

BASE_NORMS = ("l2", "l1", "huber", "lpips")
CT_WEIGHTS = (*BASE_WEIGHTS, "inverse-step")


@dataclass(frozen=True)
class CTLoss(Loss):
    """Consistency training (arXiv 2303.01469, algorithm 3), per sample.

    With i an integer index of EDM's schedule of `num_scales` levels, t = sigma(i), t' = sigma(i+1),
    and one noise n for both states,

    loss = w(t) ||D(x0 + t n, t) - D'(x0 + t' n, t')||,  0 <= i <= num_scales - 2,

    D' the target network without gradient. The norm is a mean over elements, as in that paper:
    "l2" mean(d^2), "l1" mean(|d|), "lpips" LPIPS. "huber" is improved consistency training's
    (arXiv 2310.14189, table 1) divided by the number of elements n, (sqrt(||d||_2^2 + c^2) - c)/n.
    The driver multiplies every loss by n for EDM's gradient scale: "huber" then has iCT's numbers,
    the others n times those of consistency training.

    w(t) is, by name: "uniform" 1, "snr" t^-2, "snr+1", "karras" t^-2 + sigma_data^-2,
    "truncated-snr" max(t^-2, 1), or iCT's "inverse-step" 1/(t - t').

    iCT is `CTLoss(Exponential(total_steps=K), base_norm="huber", base_weight="inverse-step",
    lognormal=(-1.1, 2.0))` with `net` itself as the target network; where it has dropout, the two
    calls draw masks of their own.

    `loss(net, target_net, images, labels=None, augment_pipe=None) -> [B]`; `pair` and `evaluate`
    are its two halves. The fused path needs `networks.CTPrecond` with the same sigma_data and
    sigma_min; the target network runs once in each step.

    Args:
        num_scales: number of noise levels, >= 2, or a curriculum: a callable step -> number, such
            as those of `losses.curricula`. This object never changes: `loss.at(step)` is the loss
            of a step.
        sigma_data, sigma_min, sigma_max, rho: of the data and of the schedule.
        huber_c: c > 0 of "huber"; None is iCT's 0.00054 sqrt(n).
        backend: which backend the ops use, as in `td_loss`.

    The other arguments are described where they are declared.

    Raises:
        ValueError: an argument is out of its range.

    Gradient to `net`'s parameters. The draws come from torch's global generator: the index, then
    the seed of the noise.
    """

    num_scales: int | Callable[[int], int] = 40
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    base_norm: str = flag(
        "l2",
        "Distance of the two denoised images; huber is improved consistency training's, lpips "
        "needs `pip install tdkern[lpips]` and images [B, 3, H, W] in [-1, 1].",
        choices=BASE_NORMS,
    )
    base_weight: str = flag("uniform", "Weight of a noise level.", choices=CT_WEIGHTS)
    huber_c: float | None = field(default=None, kw_only=True)
    lognormal: tuple[float, float] | None = flag(
        None,
        "(P_mean, P_std): noise levels as a log-normal t falls between them; -1.1,2 is improved "
        "consistency training's.",
        metavar="MEAN,STD",
        default_help="drawn evenly",
        kw_only=True,
    )

    def __post_init__(self):
        name = type(self).__name__
        for argument, names in (("base_norm", BASE_NORMS), ("base_weight", CT_WEIGHTS)):
            value = getattr(self, argument)
            if value not in names:
                known = ", ".join(names)
                raise ValueError(f"{name}: {argument} must be one of {known}, got {value!r}")
        if self.lognormal is not None and not self.lognormal[1] > 0:
            raise ValueError(
                f"{name}: lognormal must be (P_mean, P_std) with P_std > 0, got {self.lognormal}"
            )
        # these two ops check the others
        steps = {"steps": 2} if callable(self.num_scales) else {}
        empty = torch.zeros(0, 8, dtype=torch.float32, device="cpu")
        td_coef(empty[:, 0], **self._coef_args() | steps, backend="reference")
        td_loss(empty, empty, empty, empty, **self._norm, backend="reference")
        if self.lognormal is not None:
            low, high = self._lognormal_range()
            if not low < high:
                raise ValueError(
                    f"{name}: lognormal must have levels between sigma_min and sigma_max, "
                    f"got {self.lognormal}"
                )

    @property
    def preconditioning(self) -> CT:
        return CT(self.sigma_data, self.sigma_min)

    def _coef_args(self) -> dict:
        base_weight = self.base_weight
        if base_weight == "inverse-step":
            base_weight = "uniform"  # `pair` divides by the step
        return {
            "steps": self.num_scales,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "rho": self.rho,
            "sigma_data": self.sigma_data,
            "from_index": True,
            "precond": "ct",
            "base_weight": base_weight,
            "lambda_base": 0.0,
            "td_sigma": NO_TD,
        }

    @property
    def _norm(self) -> dict:
        base_norm = "l2" if self.base_norm == "lpips" else self.base_norm
        return {"base_norm": base_norm, "huber_c": self.huber_c}

    def prepare(self, image_shape: tuple[int, ...]) -> None:
        if self.base_norm == "lpips":
            if image_shape[0] != 3:
                raise ValueError(
                    f"base_norm lpips needs images of 3 channels, got {image_shape[0]}"
                )
            lpips()

    def at(self, step: int) -> "CTLoss":
        """The loss of a training step, from 0: this one with the curriculum's number of scales."""
        if not callable(self.num_scales):
            return self
        return replace(self, num_scales=self.num_scales(step))

    def pair(
        self, images: Tensor, *, index: Tensor | None = None, noise: Tensor | None = None
    ) -> TDBatch:
        """x_t = x0 + t noise and x_t' = x0 + t' noise.

        Args:
            images: [B, ...] float32 or float64, clean data.
            index: [B] int64, in 0 .. num_scales - 2, checked on the CPU alone; drawn if None.
            noise: as `images`, unit noise; drawn if None.

        Raises:
            ValueError: a wrong shape, dtype or index, or `num_scales` is a curriculum: take the
                pair of `loss.at(step)`.
        """
        self._check_images(images)
        name = type(self).__name__
        if callable(self.num_scales):
            raise ValueError(
                f"{name}: num_scales must be a number, got a curriculum: use loss.at(step)"
            )
        if index is None:
            index = self._draw_index(images)
        self._check_shape("index", index, images.shape[:1])
        last = self.num_scales - 2
        if can_check_values(index) and not ((index >= 0) & (index <= last)).all():
            found = f"{index.min().item()} to {index.max().item()}"
            raise ValueError(f"{name}: index must be from 0 to {last}, got values from {found}")
        coef, levels = td_coef(index, **self._coef_args(), backend=self.backend)
        sigma, sigma_p = levels[:, SIGMA], levels[:, SIGMA_P]
        if self.base_weight == "inverse-step":
            coef[:, W_BASE] /= sigma - sigma_p
        x_t, x_tp = self._noisy_pair(images, sigma, sigma_p, "shared", noise, None)
        return TDBatch(images, x_t, x_tp, coef, levels)

    def _draw_index(self, images: Tensor) -> Tensor:
        assert not callable(self.num_scales)
        if self.lognormal is None:
            return torch.randint(self.num_scales - 1, images.shape[:1], device=images.device)
        mean, std = self.lognormal
        low, high = self._lognormal_range()
        uniform = torch.rand(len(images), dtype=torch.float64, device=images.device)
        sigma = (mean + std * ndtri(low + (high - low) * uniform)).exp()
        index = EDM(self.num_scales, self.sigma_min, self.sigma_max, self.rho).index(sigma)
        return index.long().clamp(max=self.num_scales - 2)

    def _lognormal_range(self) -> list[float]:
        """The distribution function of `lognormal` at sigma_min and sigma_max."""
        assert self.lognormal is not None
        mean, std = self.lognormal
        ends = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64, device="cpu")
        return ndtr((ends.log() - mean) / std).tolist()

    def _terms(
        self,
        out: Tensor,
        out_target: Tensor,
        x0: Tensor,
        coef: Tensor,
        x_t: Tensor | None,
        x_tp: Tensor | None,
    ) -> Tensor:
        weight = coef[:, W_BASE].clone()
        if self.base_norm == "lpips":
            coef[:, W_BASE] = 0  # the op gives the TD term alone
        terms = td_loss(
            out,
            out_target,
            x0,
            coef,
            x_t,
            x_tp,
            base="consistency",
            **self._norm,
            backend=self.backend,
        )
        if self.base_norm != "lpips":
            return terms
        D = _denoised(out, x_t, coef[:, SKIP], coef[:, SCALE])
        D_p = _denoised(out_target, x_tp, coef[:, SKIP_P], coef[:, SCALE_P])
        return torch.stack([terms[:, 0], weight.to(terms.dtype) * lpips()(D, D_p)], 1)


def _denoised(F: Tensor, x: Tensor | None, skip: Tensor, scale: Tensor) -> Tensor:
    """D = skip x + scale F, where x is None for skip = 0."""
    D = per_sample(scale, F) * F
    return D if x is None else D + per_sample(skip, F) * x


@dataclass(frozen=True)
class TDCTLoss(CTLoss):
    """Consistency training with a temporal-difference term (arXiv 2606.15048).

    With tau = sigma(i + one_idx) and tau' = sigma(i + 1 + one_idx),
    delta = A (x0 - D(x_t, t)) - A' (x0 - D'(x_t', t')),  A = 1 - kappa from `two_moment`,
    loss = w_td mean(delta^2) + lambda_base CT's loss, or (1 + lambda_base) CT's loss where the pair
    leaves the schedule, i + 1 + one_idx > num_scales - 1.

    As CT needs, the states share their noise, so that TD's target of D, x0 - r (x0 - D') with
    r = A'/A, is biased off the exact denoiser: for Gaussian data of standard deviation sigma_data
    its slope in x_t is off by +13, +22, +26 and +25 % at t = .5, 1, 2 and 4 with the other
    defaults, the share r t' (t - t') / (sigma_data^2 + t'^2). But CT's optimum is not the denoiser:
    it is where the ODE from x_t ends, and from that function's slope,
    sigma_data / sqrt(sigma_data^2 + t^2), the target of TD is off by 0, +1, +2 and +3 %; less with
    more scales.

    The coupling is of the means: "markov" is kappa = (tau/t)^2, as the published code has it,
    "shared" tau/t. The other arguments are `CTLoss`'s, or described where they are declared. TD
    costs no further forward: D' at (x_t', t') is CT's.
    """

    lambda_base: float = lambda_base_flag()
    one_idx: float = flag(0.25, "Distance from t to tau, in steps, > 0.")
    weight: str = flag("pairwise_x0", "Weight of the TD term.", choices=WEIGHTS)
    coupling: str = flag("markov", "Noise of the pair; shared noise is biased.", choices=ETA)

    def __post_init__(self):
        if not self.lambda_base >= 0:
            raise ValueError(f"TDCTLoss: lambda_base must be a number >= 0, got {self.lambda_base}")
        eta_of(self.coupling)
        super().__post_init__()

    def _coef_args(self) -> dict:
        return super()._coef_args() | {
            "lambda_base": self.lambda_base,
            "td_sigma": None,
            "one_idx": self.one_idx,
            "weight": self.weight,
            "coupling": self.coupling,
        }


@tensor_cache()
def lpips() -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS of images in [-1, 1], [B, 3, H, W], as consistency models were trained.

    (arXiv 2303.01469.) Images below 256 pixels are first scaled up to 224.
    """
    try:
        from piq import LPIPS
    except ImportError as error:
        raise ImportError(
            "CTLoss: base_norm 'lpips' needs piq and torchvision: `pip install tdkern[lpips]`"
        ) from error
    distance = LPIPS(replace_pooling=True, reduction="none")  # fetches VGG16's weights, once

    def prepared(image: Tensor) -> Tensor:
        if image.shape[-1] < 256:
            image = interpolate(image, size=224, mode="bilinear")
        return image / 2 + 0.5

    return lambda D, D_p: distance(prepared(D), prepared(D_p))
