"""Networks of EDM, and state dicts of any, from others' files to `model.safetensors`."""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..data.files import brief, check_new, read_file, write_atomic
from ..networks.precond import Preconditioned
from ..networks.saved import (
    FORMAT,
    PRECISIONS,
    CheckpointError,
    DescriptionError,
    check_header,
    file_metadata,
    load,
)
from .modules import found_network, nested_tensors
from .pickles import PickleError, PickleFile

MAX_CONFIG = 1 << 20  # bytes of a diffusers config.json


def convert(src: str | Path, dst: str | Path) -> str:
    """Write a network that another program saved as one safetensors file.

    Nothing in `src` is executed.

    | src | dst |
    | --- | --- |
    | EDM's network-snapshot-*.pkl | the EMA network, which `tdkern generate` rebuilds |
    | EDM's training-state-*.pt | the same of its network "net", which is no average |
    | such a file with a network of tdkern's own in it | the same |
    | another file of torch.save, such as a state dict | its tensors under their own names |
    | a diffusers folder | its tensors under their own names, and its config |

    What a file's record of a network does not say is as in EDM's constructors. A network may be
    inside DataParallel, DistributedDataParallel, `torch.compile` or an average; an "ema" that is a
    state dict is taken with the description of the network beside it. What lies beside the network
    is listed and left out, whatever its classes are. The names of a nested dict are joined by dots,
    without the prefixes of torch's wrappers; in a list or tuple the names are the places, as in
    `ema.shadow_params.0`. A NumPy array of numbers is a tensor too.

    Args:
        src: the file or folder.
        dst: a .safetensors file that is not there yet. Its metadata has JSON under "tdkern":
            format, network (its classes and their arguments, or null where tdkern has no such
            network), source, and a diffusers config.

    Returns:
        One line that says what was done.

    Raises:
        ValueError: `src` is refused, holds no tensors or is safetensors already, or `dst` is not a
            new .safetensors file.
            Nothing is written then.
    """
    import safetensors.torch

    src, dst = Path(src), Path(dst)
    if dst.suffix != ".safetensors":
        raise ValueError(f"convert: DST must end in .safetensors, got {dst}")
    check_new("convert: DST", dst)
    tensors, meta, done, left = _diffusers(src) if src.is_dir() else _pickled(src)
    if not tensors:
        raise CheckpointError(f"{src}: no tensors in it; give a file that holds a network")
    network = meta.get("network")
    if network:
        build(network, tensors, src)
    more = {name: value for name, value in meta.items() if name != "network"}
    meta = file_metadata(network, src.name, **more)
    write_atomic(dst, safetensors.torch.save(tensors, meta))
    return (
        f"{dst}: {done}: {len(tensors)} tensors, {sum(map(Tensor.numel, tensors.values())):,} "
        f"numbers; left out: {left}"
    )


def load_converted(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[Preconditioned, dict]:
    """The network in a file of `convert` or `save_network`, ready to sample from.

    Args:
        path: the .safetensors file.
        device: where the network goes. One that was trained in half precision computes in it on a
            GPU, as in EDM.

    Returns:
        (net, meta): net(x, sigma, class_labels=None) -> D in evaluation mode without gradients;
        meta["network"] describes it.

    Raises:
        CheckpointError: the file cannot be read, or holds no network that tdkern has.
    """
    from safetensors import SafetensorError, safe_open

    try:
        check_header(path)
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})["tdkern"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        version, network = meta["format"], meta["network"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a file of tdkern convert ({brief(error)}); tdkern convert makes one"
        ) from error
    if version != FORMAT:
        raise CheckpointError(
            f"{path}: in format {version}; this tdkern reads format {FORMAT}; update it, or "
            "convert the network again"
        )
    if not network:
        raise CheckpointError(
            f"{path}: holds tensors, and no network that tdkern has; give a file that tdkern "
            "convert made of an EDM network, or that save_network wrote"
        )
    net = build(network, tensors, Path(path)).to(device)
    if next(net.parameters()).is_cuda:
        net.dtype = PRECISIONS[network["precision"]]
    return net.eval().requires_grad_(False), meta


def build(network: dict, tensors: dict[str, Tensor], path: Path) -> Preconditioned:
    """The network of a description with its tensors.

    It computes in the image's precision. Raises CheckpointError where they do not agree, before
    memory or time is spent.
    """
    try:
        net = load(network, tensors, path)
    except DescriptionError as error:
        raise CheckpointError(f"{path}: does not describe a network of tdkern ({error})") from error
    net.dtype = None
    return net


def _pickled(src: Path) -> tuple[dict[str, Tensor], dict, str, str]:
    """Tensors, metadata, what they are and what is left out, of a pickle or torch.save's file."""
    try:
        file = PickleFile(src)
    except PickleError as error:
        if _is_safetensors(src):
            raise CheckpointError(
                f"{src}: is safetensors already, so there is nothing to convert; tdkern generate "
                "reads it if tdkern convert or save_network wrote it"
            ) from error
        raise
    is_container = type(file.value) in (dict, list, tuple)
    value = file.value if is_container else {"it": file.value}
    found = found_network(file, value) if type(value) is dict else None
    if found:
        done = f"{found.key} of {src.name}, {found.classes}"
        if found.network:
            images = f"{found.network['img_resolution']} pixels"
            done += f", {images}, {found.network['label_dim']} classes"
        else:
            done += ", which tdkern has not, so its tensors under their own names"
        done = "; ".join([done, *found.notes])
        return found.tensors, {"network": found.network}, done, found.left
    tensors, others = nested_tensors(file, value)
    if not tensors and file.strange:
        raise file.refuse(file.strange[0])
    return tensors, {}, f"the tensors of {src.name} under their own names", others


def _is_safetensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        check_header(path)
        with safe_open(path, "pt"):
            return True
    except (OSError, ValueError, SafetensorError):
        return False


def _diffusers(src: Path) -> tuple[dict[str, Tensor], dict, str, str]:
    """The same from a diffusers folder: a model's, or a pipeline's with its model in unet."""
    import safetensors.torch

    folder = src / "unet" if (src / "unet").is_dir() else src
    weights = folder / "diffusion_pytorch_model.safetensors"
    try:
        config = json.loads(read_file(folder / "config.json", MAX_CONFIG))
        name = str(config["_class_name"])[:100]
        check_header(weights)
        tensors = safetensors.torch.load_file(weights)
    except (
        OSError,
        safetensors.SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ) as error:
        raise CheckpointError(
            f"{src}: no diffusers folder with config.json and {weights.name} ({brief(error)}); "
            "save it by diffusers' save_pretrained, or give a file"
        ) from error
    done = (
        f"{name} of {src.name}, which tdkern has not, so its tensors under their own names and "
        "its config"
    )
    return tensors, {"diffusers": config}, done, "nothing"
