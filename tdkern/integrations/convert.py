"""Networks of EDM, and state dicts of any, from others' files to `model.safetensors`."""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..data.files import brief, read_file, write_atomic
from ..networks.saved import PRECISIONS, CheckpointError, DescriptionError, check_header, load
from .pickles import MODULE_DICT, RECORD, Call, PickleFile

FORMAT = 1
MAX_CONFIG = 1 << 20  # bytes of a diffusers config.json
# EDM's classes that tdkern has too: of a wrapper, the constructor arguments that are also
# attributes
MODELS = ("SongUNet", "DhariwalUNet")
SETTINGS = {
    "EDMPrecond": ("sigma_data",),
    "VPPrecond": ("beta_d", "beta_min", "M", "epsilon_t"),
    "VEPrecond": ("sigma_min", "sigma_max"),
    "iDDPMPrecond": ("C_1", "C_2", "M"),
}


def convert(src: str | Path, dst: str | Path) -> str:
    """Write a network that another program saved as one safetensors file.

    Nothing in `src` is executed.

    | src | dst |
    | --- | --- |
    | EDM's network-snapshot-*.pkl | the EMA network, which `tdkern generate` rebuilds |
    | EDM's training-state-*.pt | the same of its network "net", which is no average |
    | another file of torch.save, such as a state dict | its tensors under their own names |
    | a diffusers folder | its tensors under their own names, and its config |

    The names of a nested dict are joined by dots.

    Args:
        src: the file or folder.
        dst: a .safetensors file that is not there yet. Its metadata has JSON under "tdkern":
            format, network (its classes and their arguments, or null where tdkern has no such
            network), source, and a diffusers config.

    Returns:
        One line that says what was done.

    Raises:
        ValueError: `src` is refused or holds no tensors, or `dst` is not a new .safetensors file.
            Nothing is written then.
    """
    import safetensors.torch

    src, dst = Path(src), Path(dst)
    if dst.suffix != ".safetensors":
        raise ValueError(f"convert: DST must end in .safetensors, got {dst}")
    if dst.exists():
        raise ValueError(
            f"convert: DST must not be there yet, got {dst}; remove it or give another name"
        )
    tensors, meta, done, left = _diffusers(src) if src.is_dir() else _pickled(src)
    if not tensors:
        raise CheckpointError(f"{src}: no tensors in it; give a file that holds a network")
    network = meta.get("network")
    if network:
        build(network, tensors, src)
    meta = {"format": FORMAT, "network": None, "source": src.name, **meta}
    write_atomic(dst, safetensors.torch.save(tensors, {"format": "pt", "tdkern": json.dumps(meta)}))
    return (
        f"{dst}: {done}: {len(tensors)} tensors, {sum(map(Tensor.numel, tensors.values())):,} "
        f"numbers; left out: {left}"
    )


def load_converted(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[Preconditioned, dict]:
    """The network in a file of `convert`, ready to sample from.

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
            "convert made of an EDM network"
        )
    net = build(network, tensors, Path(path)).to(device)
    if next(net.parameters()).is_cuda:
        net.dtype = PRECISIONS[network["precision"]]
    return net.eval().requires_grad_(False), meta


def build(network: dict, tensors: dict[str, Tensor], path: Path) -> torch.nn.Module:
    """The network of a description, of one of EDM's classes, with its tensors.

    It computes in the image's precision. Raises CheckpointError where they do not agree, before
    memory or time is spent.
    """
    try:
        if network["class"] not in SETTINGS:
            raise DescriptionError(f"no class {str(network['class'])[:50]!a}")
        net = load(network, tensors, path)
    except (DescriptionError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, DescriptionError) else brief(error)
        raise CheckpointError(
            f"{path}: does not describe a network of tdkern ({reason})"
        ) from error
    net.dtype = None
    return net


def _pickled(src: Path) -> tuple[dict[str, Tensor], dict, str, str]:
    """Tensors, metadata, what they are and what is left out, of a pickle or torch.save's file."""
    file = PickleFile(src)
    value = file.value if type(file.value) is dict else {"it": file.value}
    networks = [key for key, entry in value.items() if "_modules" in _state(entry)]
    if not networks:
        tensors, others = _flatten(file, value)
        return (
            tensors,
            {},
            f"the tensors of {src.name} under their own names",
            f"{others} entries that are no tensors",
        )
    key = next((key for key in ("ema", "net") if key in networks), networks[0])
    net = value[key]
    model = _part(file, _state(net), "_modules").get("model")
    done = f"{key} of {src.name}, {_class_name(net)}" + (f"({_class_name(model)})" if model else "")
    tensors, network = _module_tensors(file, net), _describe(file, net, model)
    if network:
        done += f", {network['img_resolution']} pixels, {network['label_dim']} classes"
    else:
        done += ", which tdkern has not, so its tensors under their own names"
    return tensors, {"network": network}, done, _listed([other for other in value if other != key])


def _listed(names: list) -> str:
    """The first of some names, which may be a file's."""
    return (
        ", ".join(
            [ascii(str(name)[:50])[1:-1] for name in names[:10]] + ["..."] * (len(names) > 10)
        )
        or "nothing"
    )


def _record(value) -> dict:
    """What EDM's persistence, or a ModuleDict, says of an object."""
    if (
        type(value) is Call
        and value.name == RECORD
        and len(value.args) == 1
        and type(value.args[0]) is dict
    ):
        return value.args[0]
    if type(value) is Call and value.name == MODULE_DICT:
        return {"class_name": "ModuleDict", "state": value.state}
    return {}


def _state(value) -> dict:
    state = _record(value).get("state")
    return state if type(state) is dict else {}


def _class_name(value) -> str:
    name = _record(value).get("class_name")
    return name[:100] if type(name) is str and name.isidentifier() else type(value).__name__


def _part(file: PickleFile, state: dict, name: str) -> dict:
    part = state.get(name)
    if type(part) is not dict:
        raise file.refuse(f"it is damaged (a module has no {name})")
    return part


class _Collector:
    """Tensors by name, together no larger than what the file could hold."""

    def __init__(self, file: PickleFile):
        self.file, self.tensors, self.seen, self.size = file, {}, set(), 0

    def enter(self, value, name: str) -> None:
        """Go into a container, once: a file may make one that contains itself, or doubles."""
        if id(value) in self.seen or len(name) > 1000:
            raise self.file.refuse("a part of it is in two places, or nested too deep")
        self.seen.add(id(value))

    def add(self, name: str, value) -> None:
        if len(name) > 1000 or not name.isprintable():
            raise self.file.refuse(f"a tensor's name is {name[:100]!a}")
        tensor = self.file.tensor(value)
        self.size += tensor.nbytes
        if self.size > 2 * self.file.size:
            raise self.file.refuse("its tensors are larger than the file")
        if name in self.tensors:
            raise self.file.refuse(f"two tensors are named {name[:100]!a}")
        self.tensors[name] = tensor


def _module_tensors(file: PickleFile, root) -> dict[str, Tensor]:
    """The state dict of a pickled module, in its order."""
    found, todo = _Collector(file), [("", root)]
    while todo:
        prefix, module = todo.pop()
        found.enter(module, prefix)
        state = _state(module)
        transient = state.get("_non_persistent_buffers_set")
        for part in ("_parameters", "_buffers"):
            tensors = _part(file, state, part)
            found.enter(tensors, prefix)
            for name, value in tensors.items():
                if value is not None and not (
                    part == "_buffers" and type(transient) is set and name in transient
                ):
                    found.add(f"{prefix}{name}", value)
        todo += [
            (f"{prefix}{name}.", child)
            for name, child in reversed(_part(file, state, "_modules").items())
            if child is not None
        ]
    return found.tensors


def _flatten(file: PickleFile, value: dict) -> tuple[dict[str, Tensor], int]:
    """The tensors in nested dicts, and how many other entries there are."""
    found, left, todo = _Collector(file), 0, [("", value)]
    while todo:
        prefix, part = todo.pop()
        found.enter(part, prefix)
        for name, entry in part.items():
            if file.is_tensor(entry):
                found.add(f"{prefix}{name}", entry)
            elif type(entry) is dict:
                todo.append((f"{prefix}{name}.", entry))
            else:
                left += 1
    return found.tensors, left


def _describe(file: PickleFile, net, model) -> dict | None:
    """How `build` makes a pickled network; None if it is not one of tdkern's."""
    if _class_name(net) not in SETTINGS or _class_name(model) not in MODELS:
        return None
    if _state(model).get("_init_args"):
        raise file.refuse("its network was made with arguments that have no names")

    def plain(entries: dict, names) -> dict:
        return {str(name): file.plain(entries[name]) for name in names if name in entries}

    state, arguments = _state(net), _part(file, _state(model), "_init_kwargs")
    return {
        "class": _class_name(net),
        "arguments": plain(state, SETTINGS[_class_name(net)]),
        "model": _class_name(model),
        "model_arguments": plain(arguments, arguments),
        "precision": "fp16" if state.get("use_fp16") else "fp32",
        **plain(state, ("img_resolution", "img_channels", "label_dim")),
    }


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
