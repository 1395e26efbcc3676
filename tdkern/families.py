"""Every family of losses, in one place: options, flags, checkpoints and tests read it from here.

docs/add_a_family.md says how to add one.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields

from .fields import flags_of
from .losses import (
    CTLoss,
    DDPMLoss,
    EDMLoss,
    FlowLoss,
    Loss,
    TDCTLoss,
    TDDDPMLoss,
    TDEDMLoss,
    TDFlowLoss,
    TDVELoss,
    TDVPLoss,
    VELoss,
    VPLoss,
)
from .networks import CTPrecond, Denoiser, EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from .networks.precond import Preconditioned
from .networks.presets import unet_arguments
from .networks.saved import NetworkSpec


@dataclass(frozen=True)
class Family:
    """A way to train a network, and to sample from it.

    Args:
        loss, td_loss: the losses without and with the TD term. The fields of `td_loss` that are
            flags (`fields.flag`) are the family's own options.
        wrapper: what makes a U-Net a denoiser.
        arguments: of the wrapper, as JSON holds them, from the loss and whether the U-Net embeds
            its noise level by Fourier features, which are made for c_noise around 1, and not for
            DDPM's times up to 1000.
        sampler: the sampler where none is asked for, a name of `samplers.SAMPLERS`.
        sampler_with_steps: the same where a number of steps is asked for.
        fixed: arguments of the losses that the family does not leave open.
        dropout: of the network, where none is given.
        consistency: whether the loss compares the network with its target at every step, so that
            the target is needed without TD too, and the number of noise levels may grow.
    """

    loss: type[Loss]
    td_loss: type[Loss]
    wrapper: type[Preconditioned]
    arguments: Callable[..., dict] = lambda loss, fourier: {}
    sampler: str = "heun"
    sampler_with_steps: str = "heun"
    fixed: dict = field(default_factory=dict)
    dropout: float = 0.13
    consistency: bool = False

    @property
    def options(self) -> dict[str, Field]:
        """The family's own options: the flags of its losses that are not fixed."""
        flags = flags_of(self.td_loss)
        return {name: each for name, each in flags.items() if name not in self.fixed}

    def make_loss(self, td: bool, settings: dict) -> Loss:
        """The loss with or without TD; `settings` may hold those of TD in both cases."""
        loss = self.td_loss if td else self.loss
        known = {each.name for each in fields(loss)}
        settings = {name: value for name, value in settings.items() if name in known}
        return loss(**self.fixed, **settings)

    def network(
        self,
        loss: Loss,
        arch: str,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        *,
        precision: str = "fp32",
        **unet,
    ) -> NetworkSpec:
        """The network of a loss around one of EDM's U-Nets; `unet` as in `networks.unet`."""
        model, model_arguments = unet_arguments(
            arch, img_resolution, img_channels, label_dim, **unet
        )
        fourier = model_arguments.get("embedding_type") == "fourier"
        return NetworkSpec(
            wrapper=self.wrapper.__name__,
            arguments=self.arguments(loss, fourier),
            model=model.__name__,
            model_arguments=model_arguments,
            precision=precision,
            img_resolution=img_resolution,
            img_channels=img_channels,
            label_dim=label_dim,
        )


def _edm(loss: EDMLoss, fourier: bool) -> dict:
    return {"sigma_data": loss.sigma_data}


def _ct(loss: CTLoss, fourier: bool) -> dict:
    # easy consistency tuning goes on from EDM's weights, in EDM's preconditioning
    return {
        "sigma_data": loss.sigma_data,
        "sigma_min": 0.0 if loss.continuous else loss.sigma_min,
        "sigma_max": loss.sigma_max,
        "time_scale": 0.25 if fourier or loss.continuous else 250.0,
    }


def _ddpm(loss: DDPMLoss, fourier: bool) -> dict:
    return {
        "prediction": loss.prediction,
        "schedule": {"T": loss.T, "beta_schedule": loss.beta_schedule},
        "time_scale": 1 / loss.T if fourier else 1.0,
    }


def _flow(loss: FlowLoss, fourier: bool) -> dict:
    return {"prediction": loss.prediction, "time_scale": 1.0 if fourier else 1000.0}


FAMILIES = {
    "edm": Family(EDMLoss, TDEDMLoss, EDMPrecond, _edm),
    "ct": Family(
        CTLoss,
        TDCTLoss,
        CTPrecond,
        _ct,
        sampler="onestep",
        sampler_with_steps="multistep",
        dropout=0.0,
        consistency=True,
    ),
    "ddpm": Family(DDPMLoss, TDDDPMLoss, Denoiser, _ddpm),
    "iddpm": Family(
        DDPMLoss,
        TDDDPMLoss,
        iDDPMPrecond,
        # the levels that the wrapper knows, and what it predicts
        fixed={"T": 1000, "beta_schedule": "cosine", "prediction": "eps"},
    ),
    "vp": Family(VPLoss, TDVPLoss, VPPrecond),
    "ve": Family(VELoss, TDVELoss, VEPrecond),
    "flow": Family(FlowLoss, TDFlowLoss, Denoiser, _flow),
}
DEFAULT = "edm"


def families_with(name: str) -> list[str]:
    """The families that have an option of their own of this name."""
    return [family for family, each in FAMILIES.items() if name in each.options]


def default_sampler(net: Preconditioned, steps_given: bool = False) -> str:
    """The name of the sampler where none is asked for: that of the family whose network it is.

    A network that is no family's, such as one of another program, is sampled as EDM's, which serves
    every denoiser.
    """
    its = [family for family in FAMILIES.values() if family.wrapper is type(net)]
    family = its[0] if its else FAMILIES[DEFAULT]
    return family.sampler_with_steps if steps_given else family.sampler
