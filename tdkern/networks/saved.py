"""Networks as they are stored: what a file says of one, and what it takes to make it again.

A file of one network is a safetensors file of its state dict, with JSON under "tdkern" in its
metadata: format, network (`NetworkSpec.to_json`, or null for tensors of a network that tdkern has
not), source.
"""

import hashlib
import inspect
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.files import FileError, brief, check_file, write_atomic
from ..preconditioning import unwrapped
from ..schedules import DDPM
from .precond import Preconditioned
from .remembered import Remembered
from .unet import UNet

# the dtype of the image inside the network, None being the image's own
PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMAT = 1  # of a file of one network
MAX_HEADER = 1 << 23  # bytes of a safetensors header: a hundred times what a large network's takes
MOST_TIMES = 1_000_000  # noise levels of a wrapper that keeps a table of them
LONGEST = 100  # numbers in a list of a network's arguments, but for a table of noise levels
# what torch's wrappers inside a network put into its tensors' names
WRAPPINGS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# what comes of a description that is none
UNFIT = (
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
    RecursionError,
)


class CheckpointError(FileError):
    """A checkpoint that cannot be used; the message names the file and says what to do."""


class DescriptionError(ValueError):
    """What should describe a network and does not; the message says in one line why."""


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


def describe(net: nn.Module) -> NetworkSpec:
    """How to make a network of tdkern's again, from what it and its U-Net were made with.

    Raises:
        ValueError: it is no `Preconditioned` network around a U-Net of tdkern's, or was made with
            an argument that JSON does not hold.
    """
    model = unwrapped(getattr(net, "model", None))
    if not isinstance(net, Preconditioned) or not isinstance(model, UNet):
        inside = f" around {type(model).__name__}" if model is not None else ""
        raise ValueError(
            "save_network: net must be a network of tdkern.networks around a SongUNet or "
            f"DhariwalUNet, got {type(net).__name__}{inside}"
        )
    dtypes = {dtype: name for name, dtype in PRECISIONS.items()}
    if net.dtype not in dtypes:
        raise ValueError(f"save_network: net.dtype must be half precision or None, got {net.dtype}")
    return NetworkSpec(
        wrapper=_class_of(net).__name__,
        model=_class_of(model).__name__,
        img_resolution=model.img_resolution,
        img_channels=model.in_channels,
        label_dim=model.label_dim,
        arguments=_plain_arguments(net, but=("dtype",)),
        model_arguments=_plain_arguments(model),
        precision=dtypes[net.dtype],
    )


def _class_of(module: nn.Module) -> type:
    """A module's own class, below that which `fully_shard` makes of it."""
    return next(each for each in type(module).__mro__ if not each.__module__.startswith("torch."))


def _plain_arguments(module: Remembered, but: tuple[str, ...] = ()) -> dict:
    """What a module was made with, as JSON holds it: tensors and tuples as lists."""
    plain = {}
    for name, value in module.init_arguments.items():
        if hasattr(value, "tolist"):
            value = value.tolist()
        if name in but or value == math.inf:  # a default, which JSON does not hold
            continue
        try:
            plain[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"save_network: {type(module).__name__}'s {name} must be plain numbers or text, "
                f"got {type(value).__name__}"
            ) from error
    return plain


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """A network's state dict under the names it has without torch's wrappers, whole on this
    process: of a network under `fully_shard` all processes must ask together.
    """
    own = {name: value for name, value in net.state_dict().items() if not name.startswith("model.")}
    own |= {f"model.{name}": value for name, value in unwrapped(net.model).state_dict().items()}
    state = {}
    for name, value in own.items():
        for wrapping in WRAPPINGS:
            name = name.replace(wrapping, "")
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        state[name] = value.detach().cpu().contiguous()
    return state


def _is_sharded(net: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in net.parameters())


def save_network(net: nn.Module, path: str | Path) -> None:
    """Write a network that was trained in any loop, for `tdkern generate`, `fid` and
    `load_network`.

    Args:
        net: a network of `tdkern.networks` around a `SongUNet` or `DhariwalUNet`, as it is or
            inside DistributedDataParallel, `torch.compile` or `fully_shard`, or an average of one,
            such as `EMA`. Under `fully_shard` every process must call this, and the first writes;
            elsewhere one process must.
        path: a .safetensors file, in a directory that exists. A kill at any moment leaves what was
            there or the new file.

    Raises:
        ValueError: `net` is none of these, or has other tensors than one that is made anew, as
            with parametrizations or adapters, or `path` ends otherwise. Nothing is written then.
    """
    import safetensors.torch

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_network: path must end in .safetensors, got {path}")
    net = unwrapped(net)
    if not isinstance(net, Preconditioned):  # an average holds its copy as `module`
        net = unwrapped(getattr(net, "module", net))
    spec, tensors = describe(net), state_of(net)
    with torch.device("meta"):
        like = spec.build().state_dict()
    unlike = _shapes(tensors) ^ _shapes(like)
    if unlike:
        raise ValueError(
            f"save_network: net must have the tensors of a {spec.model} that is made anew, got "
            f"another {min(unlike)[0]}; remove parametrizations, or merge adapters, in a copy"
        )
    if _is_sharded(net) and torch.distributed.get_rank() > 0:
        return
    write_atomic(path, safetensors.torch.save(tensors, file_metadata(spec.to_json(), path.name)))


def _shapes(tensors: dict[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


def file_metadata(network: dict | None, source: str, **more) -> dict[str, str]:
    """The metadata of a file of one network."""
    meta = {"format": FORMAT, "network": network, "source": source, **more}
    return {"format": "pt", "tdkern": json.dumps(meta)}


def load(network: dict, tensors: dict[str, Tensor], path: Path) -> Preconditioned:
    """The network that a file describes, with the tensors of the file.

    A description costs neither memory nor time before its tensors are known to be there.

    Args:
        network: what `NetworkSpec.to_json` gave, or what a stranger wrote in its place.
        tensors: the network's state dict, on the CPU.
        path: the file, for errors.

    Returns:
        The network on the CPU, in training mode.

    Raises:
        DescriptionError: `network` describes none.
        CheckpointError: the tensors are not those of the network.
    """
    try:
        spec = NetworkSpec.from_json(network)
        _check_size(spec, len(tensors))
        with torch.device("meta"):
            like = spec.build()
        _check_arguments(spec, like)
    except UNFIT as error:
        raise DescriptionError(brief(error)) from error
    check_like(like.state_dict(), tensors, path)
    net = spec.build()
    net.load_state_dict(tensors)
    return net


def _check_size(spec: NetworkSpec, count: int) -> None:
    """Raise ValueError for a network that would take long to make, and has other tensors anyway.

    Args:
        spec: the network's description, of any types.
        count: of the tensors.
    """
    arguments, model = spec.arguments, spec.model_arguments
    levels = arguments.get("alphas_cumprod", ())
    lists = (value for value in [*arguments.values(), *model.values()] if type(value) is list)
    if any(len(value) > LONGEST and value is not levels for value in lists):
        raise ValueError(f"a list of more than {LONGEST} numbers")
    # a block of the encoder and one of the decoder have 20 tensors
    least = 20 * int(model.get("num_blocks", 0)) * len(model.get("channel_mult", ()))
    times = max(arguments.get("M", 0), arguments.get("schedule", {}).get("T", 0), len(levels))
    if least > count or times > MOST_TIMES:
        raise ValueError("more blocks than its tensors make, or more times than a million")


def _check_arguments(spec: NetworkSpec, net: Preconditioned) -> None:
    """Raise ValueError for arguments of other types than a network's classes say."""
    parts = {
        "preconditioning": (type(net), spec.arguments),
        "U-Net": (type(net.model), spec.model_arguments),
    }
    for part, (kind, arguments) in parts.items():
        hints = inspect.signature(kind).parameters
        for name, value in arguments.items():
            hint = hints[name].annotation if name in hints else inspect.Parameter.empty
            if not _is_of(value, hint):
                raise ValueError(f"an argument of its {part} is not {_word(hint)}: {name}")
    for name in ("img_resolution", "img_channels", "label_dim"):
        if type(getattr(spec, name)) is not int:
            raise ValueError(f"its {name} is not a whole number")


def _is_of(value, hint) -> bool:
    if hint is int:
        return type(value) is int
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is str:
        return type(value) is str
    if hint in (Sequence[int], Sequence[float]):
        return type(value) is list and all(_is_of(item, float) for item in value)
    return True  # what it is, its class knows


def _word(hint) -> str:
    return {int: "a number", float: "a number", str: "text"}.get(hint, "a list of numbers")


def check_header(file: str | Path) -> None:
    """Raise OSError or ValueError for a safetensors file with a header out of all proportion."""
    check_file(file)
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
    if MAX_HEADER < size <= os.stat(file).st_size:
        raise ValueError(f"its header has {size:,} bytes, more than the {MAX_HEADER:,} allowed")


def restore(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load a module's tensors; raises what `check_like` does."""
    check_like(module.state_dict(), tensors, path)
    module.load_state_dict(tensors)


def check_like(own: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    """Compare the tensors of a file with a network's own.

    Raises:
        CheckpointError: it names the first that is missing, unknown, of another shape, or of whole
            numbers where the network's are not.
    """
    for name in sorted(own.keys() | tensors.keys()):
        ours, theirs = (
            str(list(state[name].shape)) if name in state else "nothing" for state in (own, tensors)
        )
        if ours == theirs and own[name].is_floating_point() != tensors[name].is_floating_point():
            ours, theirs = str(own[name].dtype), str(tensors[name].dtype)
        if ours != theirs:
            raise CheckpointError(
                f"{path}: does not match the network: {name} must be {ours}, got {theirs}"
            )


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A hash by which other tensors, or others' names, are told from these."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
