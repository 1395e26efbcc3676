"""The training loop of consistency models (arXiv 2303.01469): what it calls its diffusion.

Only the calls are that loop's; nothing of its code is here.
"""

from torch import Tensor, nn

from ..losses import CTLoss, TDCTLoss
from ..networks import CTPrecond

__all__ = ["Diffusion"]

NORMS = ("l1", "l2", "lpips")


class Diffusion:
    """In the place of that loop's `diffusion`: its loss of consistency training, with or without
    TD, and its denoiser, over its U-Net.

    The U-Net is a `model(x, timesteps, y=None)` with y [B] int64; the loop's `model`,
    `ddp_model` and `target_model` are passed as they are, and the loop goes on updating its target
    itself. Dropout's masks are the same in both, as there.

    Args:
        td: whether the loss has a TD term.
        sigma_data, sigma_min, sigma_max, rho: of the data and of the schedule.
        weight_schedule: "karras", "uniform", "snr", "snr+1" or "truncated-snr".
        loss_norm: "l1", "l2" or "lpips".
        settings: other arguments of `losses.TDCTLoss` or `losses.CTLoss`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        td: bool = True,
        *,
        sigma_data: float = 0.5,
        sigma_max: float = 80.0,
        sigma_min: float = 0.002,
        rho: float = 7.0,
        weight_schedule: str = "karras",
        loss_norm: str = "lpips",
        **settings,
    ):
        if loss_norm not in NORMS:
            raise ValueError(
                f"Diffusion: loss_norm must be one of {', '.join(NORMS)}, got {loss_norm!r}"
            )
        family = TDCTLoss if td else CTLoss
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.loss = family(
            int,  # a curriculum: the step is the number of scales itself
            sigma_data=sigma_data,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            rho=rho,
            base_norm=loss_norm,
            base_weight=weight_schedule,
            **settings,
        )

    def consistency_losses(
        self,
        model: nn.Module,
        x_start: Tensor,
        num_scales: int,
        model_kwargs: dict | None = None,
        target_model: nn.Module | None = None,
    ) -> dict[str, Tensor]:
        """{"loss": [B]} of clean data at so many scales, a mean over each sample's elements.

        Args:
            model: the U-Net, wrapped or not.
            x_start: [B, C, H, W].
            num_scales: of this step, at least 2.
            model_kwargs: passed to both U-Nets: {"y": [B] int64} or nothing.
            target_model: needed, as in that loop.

        Raises:
            ValueError: there is no target, or `num_scales` is out of its range.
        """
        loss = self.loss.at(int(num_scales))
        target = None if target_model is None else self.denoiser(target_model)
        return {
            "loss": loss(self.denoiser(model), target, x_start, **self._conditions(model_kwargs))
        }

    def denoiser(self, model: nn.Module) -> CTPrecond:
        """`net(x, sigma, class_labels=y) -> D` of a U-Net, for the samplers too."""
        return CTPrecond(model, self.sigma_data, self.sigma_min, self.sigma_max)

    @staticmethod
    def _conditions(model_kwargs: dict | None) -> dict:
        given = dict(model_kwargs or {})
        return {"labels": given.pop("y", None), **given}
