"""Networks as they are stored: what a file says of one, and what it takes to make it again."""
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..schedules import DDPM
from .precond import Preconditioned
from .unet import UNet

# the dtype of the image inside the network, None being the image's own
PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and says what to do."""


def named(base: type) -> dict[str, type]:
    """The classes below `base` by name, those of a user among them, once they are imported."""
    classes = {}
    for each in base.__subclasses__():
        classes |= {each.__name__: each} | named(each)
    return classes


@dataclass(frozen=True)
class NetworkSpec:
    """A network in plain values, as checkpoints and converted files hold it in JSON.

    Args:
        wrapper: the class of the denoiser, below `Preconditioned`.
        model: the class of the U-Net inside it.
        arguments: of the wrapper; of a `Denoiser` "schedule" has T and beta_schedule of
            `schedules.DDPM` in place of alphas_cumprod.
        model_arguments: of the U-Net.
        precision: of the image inside the network, a name of PRECISIONS.
        img_resolution, img_channels, label_dim: of the images and classes.
    """

    wrapper: str
    model: str
    img_resolution: int
    img_channels: int
    label_dim: int
    arguments: dict = field(default_factory=dict)
    model_arguments: dict = field(default_factory=dict)
    precision: str = "fp32"

    @classmethod
    def from_json(cls, network: dict) -> "NetworkSpec":
        """The description that `to_json` gave; raises KeyError or TypeError for another."""
        rest = dict(network)
        return cls(wrapper=rest.pop("class"), **rest)

    def to_json(self) -> dict:
        """Plain values; the wrapper's name is under "class"."""
        values = asdict(self)
        return {"class": values.pop("wrapper"), **values}

    def build(self) -> Preconditioned:
        """The network, newly initialised, on torch's default device.

        Raises:
            ValueError: a name is not known, an argument is out of its range, or the images and
                classes are not the U-Net's.
            TypeError: an argument is none of its class's.
        """
        wrapper = _one_of("class", self.wrapper, named(Preconditioned))
        model = _one_of("model", self.model, named(UNet))(**self.model_arguments)
        images = self.img_resolution, self.img_channels, self.label_dim
        if images != (model.img_resolution, model.in_channels, model.label_dim):
            raise ValueError("NetworkSpec: its images or classes are not its U-Net's")
        dtype = _one_of("precision", self.precision, PRECISIONS)
        arguments = dict(self.arguments)
        if "schedule" in arguments:
            arguments["alphas_cumprod"] = DDPM(**arguments.pop("schedule")).alphas_cumprod
        return wrapper(model, **arguments, dtype=dtype)


def _one_of(name: str, value, known: dict):
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"NetworkSpec: {name} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def restore(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load a module's tensors.

    Raises:
        CheckpointError: it names the first tensor that is missing, unknown or of another shape.
    """
    own = module.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        ours, theirs = (
            list(state[name].shape) if name in state else "nothing" for state in (own, tensors)
        )
        if ours != theirs:
            raise CheckpointError(
                f"{path}: does not match the network: {name} must be {ours}, got {theirs}"
            )
    module.load_state_dict(tensors)
