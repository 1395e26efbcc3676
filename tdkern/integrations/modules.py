"""Networks inside pickles: what EDM's records, torch's modules and tdkern's own say of them."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ..data.files import LISTED, first_of
from ..networks.precond import Preconditioned
from ..networks.saved import WRAPPINGS, CheckpointError, check_like, named
from ..networks.unet import UNet
from .pickles import MODULE_DICT, RECORD, Call, Global, Key, PickleFile, unneeded

# EDM's wrappers that tdkern has too, and the constructor arguments that are also attributes
SETTINGS = {
    "EDMPrecond": ("sigma_data", "sigma_min", "sigma_max"),
    "VPPrecond": ("beta_d", "beta_min", "M", "epsilon_t"),
    "VEPrecond": ("sigma_min", "sigma_max"),
    "iDDPMPrecond": ("C_1", "C_2", "M"),
}
ANY_LEVEL = {"sigma_min": 0.0, "sigma_max": float("inf")}  # EDMPrecond's, which say nothing
# what holds a network without changing what it computes, and under which name
HOLDERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.optim.swa_utils.AveragedModel": "module",
    "tdkern.ema.EMA": "module",
}
MODULES = ("torch.nn.", "tdkern.networks.")  # whose modules' states are read
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
PREFERRED = ("ema", "net", "model")
CONTAINERS = (dict, list, tuple)
MORE_ENTRIES = 10_000  # that a file may have, in all their places, beyond its operations
PRECISION = {"torch.float16": "fp16", "torch.bfloat16": "bf16"}


@dataclass
class Found:
    """A network in a file, and what it is called there."""

    key: str
    classes: str
    tensors: dict[str, Tensor]
    buffers: set[str]  # which of the tensors are no parameters
    network: dict | None  # `NetworkSpec.to_json`; None where tdkern has no such network
    left: str = ""  # what was left out
    notes: list[str] = field(default_factory=list)  # what else a user must know


def found_network(file: PickleFile, value: dict) -> Found | None:
    """The network in a file's outermost dict: the average if there is one. None without one.

    Raises:
        PickleError: a part of the network is of a class that no saved network names.
        CheckpointError: an average's state dict is not the network's.
    """
    networks = {key: _held(entry) for key, entry in value.items()}
    networks = {key: net for key, net in networks.items() if "_modules" in state_of(net)}
    if not networks:
        return None
    key = min(networks, key=lambda key: _rank(key, networks[key]))
    net = networks[key]
    model = _held(_part(file, state_of(net), "_modules").get("model"))
    classes = class_name(net) + (f"({class_name(model)})" if state_of(model) else "")
    tensors, buffers = _module_tensors(file, net)
    network = _describe(file, net, model)
    found = Found(key, classes, tensors, buffers, network)
    if key != "ema" and type(value.get("ema")) is dict:
        _take_average(file, found, value["ema"])
    halves = {str(t.dtype)[6:] for t in found.tensors.values() if t.dtype.itemsize == 2}
    if halves:
        found.notes.append(f"its weights are {' and '.join(sorted(halves))}")
    found.left = listed({name: entry for name, entry in value.items() if name != found.key})
    return found


def _rank(key, net: Call) -> tuple[int, bool]:
    """The least is the network that is wanted: by its name, else the first that can be read."""
    place = PREFERRED.index(key) if key in PREFERRED else len(PREFERRED)
    return place, _is_unknown(net)


def _take_average(file: PickleFile, found: Found, average: dict) -> None:
    """Put an average that is a state dict in the place of the network's own tensors.

    Buffers that the average lacks are the network's. Entries of other names are left out.
    """
    tensors, _ = nested_tensors(file, average)
    ours = {name: tensor for name, tensor in tensors.items() if name in found.tensors}
    if not ours:
        found.notes.append("its ema has no tensor of the network's, and is left out")
        return
    missing = [name for name in found.tensors if name not in ours]
    learned = [name for name in missing if name not in found.buffers]
    if learned:
        shape = list(found.tensors[learned[0]].shape)
        raise CheckpointError(
            f"{file.path}: its ema does not match the network: {learned[0]} must be {shape}, got "
            f"nothing; without its ema, {found.key} can be converted"
        )
    check_like({name: found.tensors[name] for name in ours}, ours, file.path)
    extra = [name for name in tensors if name not in ours]
    if extra:
        found.notes.append(f"without the ema's {names_of(extra)}")
    if missing:
        found.notes.append(f"with {found.key}'s {names_of(missing)}")
    found.tensors = found.tensors | ours
    found.key = "ema"


def listed(entries: dict) -> str:
    """The names of some entries of a file, and the classes of those that no saved network names."""
    words = []
    for name, entry in entries.items():
        words.append(f"{name} ({entry.name})" if _is_unknown(entry) else name)
    return names_of(words)


def names_of(names: list) -> str:
    """The first of some names, which may be a file's; "nothing" of none."""
    return first_of([ascii(str(name)[:100])[1:-1] for name in names]) or "nothing"


def _is_unknown(entry) -> bool:
    """Whether an entry is of a class, or is a name, that no saved network has."""
    return type(entry) in (Call, Global) and not _readable(entry.name)


def _readable(name: str) -> bool:
    return Call(name, ()).known or name.startswith(MODULES) or name in HOLDERS


def _record(value) -> dict:
    """What EDM's persistence says of an object, or a module's own pickle, in the same words."""
    if type(value) is not Call:
        return {}
    if value.name == RECORD:
        described = len(value.args) == 1 and type(value.args[0]) is dict
        return value.args[0] if described else {}
    if value.name == MODULE_DICT:
        return {"class_name": "ModuleDict", "state": value.state}
    return {"class_name": value.name.rpartition(".")[2], "state": value.state}


def state_of(value) -> dict:
    """The attributes of a pickled object; empty of what is none."""
    state = _record(value).get("state")
    return state if type(state) is dict else {}


def class_name(value) -> str:
    """The class of a pickled object, without its module."""
    name = _record(value).get("class_name")
    return name[:100] if type(name) is str and name.isidentifier() else type(value).__name__


def _held(value):
    """The network inside DataParallel and its kind, or the value itself."""
    for _ in range(8):  # of a file that holds itself
        if type(value) is not Call or value.name not in HOLDERS:
            break
        state, name = state_of(value), HOLDERS[value.name]
        children = state.get("_modules")
        inner = children.get(name) if type(children) is dict else state.get(name)
        if inner is None and value.args:  # what torch.compile returns is pickled as its call
            inner = value.args[0]
        if inner is None:
            break
        value = inner
    return value


def _part(file: PickleFile, state: dict, name: str) -> dict:
    part = state.get(name)
    if type(part) is not dict:
        raise file.refuse(f"it is damaged (a module has no {name})")
    return part


class _Collector:
    """Tensors by name, together no larger than what the file could hold."""

    def __init__(self, file: PickleFile):
        self.file = file
        self.tensors = {}
        self.seen = set()
        self.size = 0
        self.buffers, self.entered = set(), 0

    def enter(self, value, name: str) -> None:
        """Go into a container, once: a file may make one that contains itself, or doubles."""
        if id(value) in self.seen or len(name) > 1000:
            raise self.file.refuse("a part of it is in two places, or nested too deep")
        self.seen.add(id(value))

    def entries(self, prefix: str, part) -> Iterable:
        """The entries of a container that may be in several places, by name.

        One that is in itself comes to the longest name; parts that double, to the most entries.
        """
        if len(prefix) > 1000:
            why = "a part of it is in two places, one inside the other, or nested too deep"
            raise self.file.refuse(why)
        self.take(len(prefix))
        self.entered += len(part)
        if self.entered > self.file.operations + MORE_ENTRIES:
            raise self.file.refuse("its parts are in too many places")
        return _without_wrappings(part).items() if type(part) is dict else enumerate(part)

    def take(self, size: int) -> None:
        """Count memory that is taken."""
        self.size += size
        if self.size > self.file.limit:
            raise self.file.refuse("its tensors are larger than the file, with their names")

    def add(self, name: str, value) -> None:
        if len(name) > 1000 or not name.isprintable():
            raise self.file.refuse(f"a tensor's name is {name[:100]!a}")
        tensor = self.file.tensor(value)
        self.take(tensor.nbytes + len(name))
        if name in self.tensors:
            raise self.file.refuse(f"two tensors are named {name[:100]!a}")
        self.tensors[name] = tensor


def _module_tensors(file: PickleFile, root) -> tuple[dict[str, Tensor], set[str]]:
    """The state dict of a pickled module, in its order, and which of its tensors are buffers."""
    found, todo = _Collector(file), [("", root)]
    while todo:
        prefix, module = todo.pop()
        module = _held(module)
        found.enter(module, prefix)
        state = _module_state(file, module)
        transient = state.get("_non_persistent_buffers_set")
        for part in ("_parameters", "_buffers"):
            tensors = _part(file, state, part)
            found.enter(tensors, prefix)
            for name, value in tensors.items():
                is_buffer = part == "_buffers"
                if value is None or (is_buffer and type(transient) is set and name in transient):
                    continue
                found.add(f"{prefix}{name}", value)
                if is_buffer:
                    found.buffers.add(f"{prefix}{name}")
        todo += [
            (f"{prefix}{name}.", child)
            for name, child in reversed(_part(file, state, "_modules").items())
            if child is not None
        ]
    return found.tensors, found.buffers


def _module_state(file: PickleFile, module) -> dict:
    """A module's attributes; raises PickleError for one that could compute something else."""
    if type(module) is Call and module.name != RECORD and not _readable(module.name):
        raise file.refuse(unneeded(module.name))
    state = state_of(module)
    for name in HOOKS:
        hooks = state.get(name)
        if type(hooks) is dict and hooks:
            hook = next(iter(hooks.values()))
            what = f", {hook.name[:100]!a}" if type(hook) in (Call, Global) else ""
            raise file.refuse(f"a module of its network has {name}{what}")
    return state


def nested_tensors(file: PickleFile, value: dict | list | tuple) -> tuple[dict[str, Tensor], str]:
    """The tensors in nested dicts, lists and tuples, and which other entries there are.

    What holds no tensor is one entry of a list or tuple, and one of a dict where it is no dict. A
    part that is in several places has its tensors under the names of all of them.
    """
    found, holders = _Collector(file), _holders(file, value)
    others = 0
    unknown = {}
    todo = [("", value)]
    while todo:
        prefix, part = todo.pop()
        for name, entry in found.entries(prefix, part):
            is_part = type(entry) is dict or id(entry) in holders
            if type(name) is Key and (is_part or file.is_tensor(entry)):
                raise file.refuse(f"a tensor's name has a {name.kind} in it")
            if file.is_tensor(entry):
                found.add(f"{prefix}{name}", entry)
            elif is_part:
                todo.append((f"{prefix}{name}.", entry))
            else:
                others += 1
                if _is_unknown(entry) and len(unknown) <= LISTED:
                    unknown[f"{prefix}{name}"] = entry
    words = f"{others} entries that are no tensors"
    return found.tensors, f"{words}: {listed(unknown)}" if unknown else words


def _holders(file: PickleFile, root) -> set[int]:
    """The ids of the containers that hold a tensor, at any depth.

    Each is entered once, however deep it is and wherever it is: from those that hold a tensor
    themselves, up to all in which they are.
    """
    inside = {id(root): []}
    holders = set()
    todo = [root]
    while todo:
        part = todo.pop()
        for entry in part.values() if type(part) is dict else part:
            if type(entry) in CONTAINERS:
                if id(entry) not in inside:
                    inside[id(entry)] = []
                    todo.append(entry)
                inside[id(entry)].append(id(part))
            elif id(part) not in holders and file.is_tensor(entry):
                holders.add(id(part))
    todo = list(holders)
    while todo:
        outer = set(inside[todo.pop()]) - holders
        holders |= outer
        todo += outer
    return holders


def _without_wrappings(part: dict) -> dict:
    """A state dict under the names that it has outside DataParallel and its kind."""
    names = {name: name for name in part}
    if not all(type(name) is str for name in part):
        return part
    for wrapping in WRAPPINGS:
        names = {name: own.replace(wrapping, "") for name, own in names.items()}
    while names and all(own.startswith("module.") for own in names.values()):
        names = {name: own.removeprefix("module.") for name, own in names.items()}
    if len(set(names.values())) < len(part):  # two would have one name
        return part
    return {names[name]: entry for name, entry in part.items()}


def _describe(file: PickleFile, net, model) -> dict | None:
    """How `NetworkSpec` makes a pickled network; None if it is not one of tdkern's."""
    if type(net) is Call and net.name.startswith("tdkern."):
        return _describe_own(file, net, model)
    if class_name(net) not in SETTINGS or class_name(model) not in ("SongUNet", "DhariwalUNet"):
        return None
    state = state_of(net)
    settings = _plain(file, state, SETTINGS[class_name(net)])
    if class_name(net) == "EDMPrecond":
        settings = {name: v for name, v in settings.items() if v != ANY_LEVEL.get(name)}
    model_arguments = _arguments(file, model)
    images = {
        "img_resolution": model_arguments.get("img_resolution"),
        "img_channels": model_arguments.get("in_channels"),
        "label_dim": model_arguments.get("label_dim", 0),
    } | _plain(file, state, ("img_resolution", "img_channels", "label_dim"))
    return {
        "class": class_name(net),
        "arguments": settings,
        "model": class_name(model),
        "model_arguments": model_arguments,
        "precision": "fp16" if state.get("use_fp16") else "fp32",
        **images,
    }


def _describe_own(file: PickleFile, net, model) -> dict | None:
    """The same of a network of tdkern's own, which holds what it was made with."""
    if class_name(net) not in named(Preconditioned) or class_name(model) not in named(UNet):
        return None
    arguments, dtype = _arguments(file, model), state_of(net).get("dtype")
    return {
        "class": class_name(net),
        "arguments": _own_arguments(file, net),
        "model": class_name(model),
        "model_arguments": arguments,
        "precision": PRECISION.get(dtype.name, "fp32") if type(dtype) is Global else "fp32",
        "img_resolution": arguments.get("img_resolution"),
        "img_channels": arguments.get("in_channels"),
        "label_dim": arguments.get("label_dim", 0),
    }


def _arguments(file: PickleFile, model) -> dict:
    """What a U-Net was made with, by name; what it was not given its constructor knows."""
    state = state_of(model)
    if type(model) is Call and model.name != RECORD:
        return _own_arguments(file, model)
    names = list(inspect.signature(named(UNet)[class_name(model)]).parameters)
    given = _part(file, state, "_init_kwargs")
    positional = state.get("_init_args", ())
    if type(positional) is not tuple or len(positional) > len(names):
        raise file.refuse("its network was made with arguments that have no names")
    by_place = dict(zip(names, positional, strict=False))
    return _plain(file, by_place | given, by_place | given)


def _own_arguments(file: PickleFile, module) -> dict:
    """What a module of tdkern's was made with."""
    given = _part(file, state_of(module), "init_arguments")
    given = {name: value for name, value in given.items() if name != "dtype"}
    plain = {name: value for name, value in given.items() if not file.is_tensor(value)}
    tensors = {name: file.tensor(given[name]).tolist() for name in given.keys() - plain.keys()}
    return _plain(file, plain, plain) | tensors


def _plain(file: PickleFile, entries: dict, names) -> dict:
    """Entries of some names, where they are there, as JSON holds them."""
    return {str(name): file.plain(entries[name]) for name in names if name in entries}
