"""Pickles read as data: no name in them is imported, and nothing is called.

No more time and memory is taken than the file has bytes, times a few.

The pickle is run by a machine of our own over `pickletools.genops`. It knows the operations that
build plain values and containers; a call of a global becomes a `Call`, which says what would have
been called. The globals that saved networks name are a fixed list. Any other stays a name: what is
beside the network, such as a loss of someone's own, is passed over, and in the part that is wanted
it is refused. Any other operation is refused.
"""

import io
import mmap
import os
import pickletools
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..data.files import brief, check_file

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file in torch.save's first format
MAX_OPERATIONS = 1_000_000  # a network of 750 tensors takes 100,000
SMALL = 1 << 20  # bytes that a file of any size may come to, such as one number expanded to many

RECORD = "torch_utils.persistence._reconstruct_persistent_obj"
MODULE_DICT = "torch.nn.modules.container.ModuleDict"
TENSOR, STORAGE = "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes"
PARAMETERS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
)
DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict")
SETS = ("builtins.set", "__builtin__.set")
BYTES = ("builtins.bytes", "__builtin__.bytes")
SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
ARRAYS = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
)
DTYPES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
GLOBALS = {
    RECORD,
    MODULE_DICT,
    TENSOR,
    *PARAMETERS,
    STORAGE,
    *DICTS,
    *SETS,
    *BYTES,
    *SCALARS,
    *ARRAYS,
    *DTYPES,
    "numpy.dtype",
    "_codecs.encode",
}

VALUES = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BINSTRING",
    "SHORT_BINSTRING",
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}


class PickleError(ValueError):
    """A pickle that was not read; the message names the file and what was refused in it."""


@dataclass(frozen=True, eq=False)
class Global:
    """A name that a pickle refers to."""

    name: str


@dataclass(eq=False)
class Call:
    """A call that a pickle asks for, and the state that the result would have been given."""

    name: str
    args: tuple
    state: object = None

    @property
    def known(self) -> bool:
        """Whether saved networks name it."""
        return self.name in GLOBALS


@dataclass(eq=False)
class Key:
    """The key of a dict, or item of a set, that is not plain: it is not compared with others."""

    kind: str


@dataclass(eq=False)
class Storage:
    """The memory of a tensor, read when it is wanted, and once.

    A file may make many tensors of one.
    """

    dtype: torch.dtype
    numel: int
    read: Callable[[], bytes]

    @cached_property
    def elements(self) -> Tensor:
        """All of it, [numel]."""
        return (
            torch.frombuffer(bytearray(self.read()), dtype=self.dtype, count=self.numel)
            if self.numel
            else torch.empty(0, dtype=self.dtype)
        )


class Refused(Exception):
    """What was refused; `PickleFile` adds the file."""


class _Budget:
    """What a file may still cost: small parts of it can ask for the same work again and again."""

    def __init__(self, size: int):
        self.operations, self.bytes = MAX_OPERATIONS, 2 * size

    def operate(self, count: int = 1) -> None:
        self.operations -= count
        if self.operations < 0:
            raise Refused(f"it has more than {MAX_OPERATIONS:,} operations")

    def copy(self, size: int) -> None:
        self.bytes -= size
        if self.bytes < 0:
            raise Refused("what it asks to copy is larger than the file")


class _Machine:
    """Runs one pickle after another of a stream.

    strange: where a list is given, a name beside `names` and a key that is not plain are passed
        over, and why each would be refused is added to it. None: they are refused.
    """

    def __init__(
        self,
        stream,
        names: set[str],
        budget: _Budget,
        storage: Callable[[tuple], Storage] | None = None,
        strange: list[str] | None = None,
    ):
        self.stream = stream
        self.names = names
        self.budget = budget
        self.storage = storage
        self.strange = strange

    def run(self):
        """The value of the next pickle."""
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, arg, _ in pickletools.genops(self.stream):
            self.budget.operate()
            self._step(opcode.name, arg)
        return self.stack.pop()

    def _step(self, name: str, arg) -> None:
        stack = self.stack
        if name in VALUES:
            stack.append(arg)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(reversed([stack.pop() for _ in range(int(name[-1]))])))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._marked()
            if not _is_unknown(stack[-1]):
                _is(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._marked()
            pairs = list(zip(map(self._key, items[::2]), items[1::2], strict=True))
            if not _is_unknown(stack[-1]):
                _is(stack[-1], dict).update(pairs)
        elif name == "ADDITEMS":
            items = self._marked()
            if not _is_unknown(stack[-1]):
                _is(stack[-1], set).update(map(self._key, items))
        elif name == "FROZENSET":
            stack.append(set(map(self._key, self._marked())))
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg])
        elif name == "GLOBAL":
            self._global(arg.replace(" ", "."))
        elif name == "STACK_GLOBAL":
            attribute, module = _is(stack.pop(), str), _is(stack.pop(), str)
            self._global(f"{module}.{attribute}")
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(self._call(_is(stack.pop(), tuple), stack.pop()))
        elif name == "NEWOBJ_EX":
            stack.pop()  # arguments by keyword, which no saved network has
            stack.append(self._call(_is(stack.pop(), tuple), stack.pop()))
        elif name == "BUILD":
            state = stack.pop()
            # what an OrderedDict has beside its items is not wanted
            if type(stack[-1]) is not dict:
                _is(stack[-1], Call).state = state
        elif name == "BINPERSID" and self.storage:
            stack.append(self.storage(_is(stack.pop(), tuple)))
        elif name not in ("PROTO", "FRAME", "STOP"):
            before = f" (and before that {self.strange[0]})" if self.strange else ""
            raise Refused(f"it has the operation {name}, which no saved network needs{before}")

    def _marked(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _global(self, name: str) -> None:
        if name not in self.names:
            self._pass_over(unneeded(name))
        self.stack.append(Global(name))

    def _key(self, value):
        if type(value) not in (str, int, bool, type(None)):  # also keeps deep tuples unhashed
            self._pass_over(f"it is damaged (a {type(value).__name__} is a key)")
            return Key(type(value).__name__)
        if type(value) is int and abs(value) >> 60:  # any number of larger ones have one hash
            self._pass_over("it is damaged (a key is an integer beyond 2^60)")
            return Key("int")
        return value

    def _pass_over(self, why: str) -> None:
        if self.strange is None:
            raise Refused(why)
        if not self.strange:  # the first is what an error says
            self.strange.append(why)

    def _call(self, args: tuple, function):
        if type(function) is Call and not function.known:  # such as a method of an unknown object
            return Call(function.name, args)
        name = _is(function, Global).name
        if name in DICTS and not args:
            return {}
        if name in SETS:
            self.budget.operate(len(_is(args[0], list)))
            return set(map(self._key, args[0]))
        if name in BYTES and not args:  # how the older protocols write none
            return b""
        if name == "_codecs.encode":  # how the older protocols write bytes
            self.budget.copy(len(_is(args[0], str)))
            return args[0].encode("latin1")
        if name == STORAGE:
            stream = io.BytesIO(_is(args[0], bytes))
            if _Machine(stream, set(), self.budget).run() != MAGIC:
                raise Refused("it is damaged (a storage is not as torch.save writes it)")
            return _is(_after_magic(stream, set(DTYPES), self.budget), Storage)
        return Call(name, args)


def _is(value, kind: type):
    if type(value) is not kind:
        raise Refused(
            f"it is damaged (a {kind.__name__} should be where a {type(value).__name__} is)"
        )
    return value


def _is_unknown(value) -> bool:
    """Whether a value is an object of a class that no saved network names."""
    return type(value) is Call and not value.known


def unneeded(name: str) -> str:
    """Why a name is refused."""
    return f"it names {name[:100]!a}, which no saved network needs"


def _storage(pid: tuple) -> tuple[str, torch.dtype, int]:
    """Key, dtype and number of elements of a storage that torch.save wrote beside the pickle."""
    kind, dtype, key, _, numel = pid[:5]
    if kind != "storage" or _is(dtype, Global).name not in DTYPES or any(pid[5:]):
        raise Refused("it is damaged (a persistent id does not name a storage)")
    return _is(key, str), DTYPES[dtype.name], _is(numel, int)


def _after_magic(stream, names: set[str], budget: _Budget, strange: list[str] | None = None):
    """The value in torch.save's first format.

    After the magic number come version, system, the value and the storages' keys, then each
    storage.
    """
    storages = {}

    def persistent(pid: tuple) -> Storage:
        key, dtype, numel = _storage(pid)
        return storages.setdefault(key, Storage(dtype, numel, bytes))

    def read(start: int, size: int) -> bytes:
        budget.copy(size)
        stream.seek(start)
        return stream.read(size)

    machine = _Machine(stream, names, budget, persistent, strange)
    _, _, value, keys = (machine.run() for _ in range(4))
    for key in _is(keys, list):
        storage = storages[_is(key, str)]
        if int.from_bytes(stream.read(8), "little") != storage.numel:
            raise Refused("it is damaged (a storage has another size than the pickle says)")
        size = storage.numel * storage.dtype.itemsize
        storage.read = partial(read, stream.tell(), size)
        stream.seek(size, os.SEEK_CUR)
    return value


class PickleFile:
    """A file of pickle, or of `torch.save` in either of its formats, read as data. See the module.

    Args:
        path: the file.

    `value` is what it holds, of None, bool, int, float, str, bytes, tuple, list, dict and set,
    `Global`, `Call` and `Storage`. It may be deep, share its parts and contain itself: walk it with
    care, and take what is wanted through the methods. `strange` has why the first thing that was
    passed over would be refused, for a file in which nothing else is found. `limit` is how many
    bytes what is taken from the file may have in memory.

    Raises:
        PickleError: the file cannot be read, is damaged, or asks for what no saved network needs.
    """

    def __init__(self, path: str | Path):
        self.path, self.strange = Path(path), []
        try:
            size = self.path.stat().st_size
            self.budget, self.limit = _Budget(size), 2 * size + SMALL
            check_file(self.path)  # a pipe would be waited for
            with open(self.path, "rb") as file:
                if file.read(2) == b"PK":
                    self.value = self._zip()
                    return
                stream = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.value = _Machine(stream, GLOBALS, self.budget, None, self.strange).run()
            if self.value == MAGIC:
                self.value = _after_magic(stream, GLOBALS, self.budget, self.strange)
        except OSError as error:
            raise PickleError(
                f"{self.path}: cannot be read ({error}); give another file"
            ) from error
        except Exception as error:  # whatever a hostile file leads to
            raise self.refuse(error) from error

    def refuse(self, why: str | Exception) -> PickleError:
        """The error that names this file."""
        if not isinstance(why, (str, Refused)):
            why = f"it is damaged ({brief(why)})"
        return PickleError(
            f"{self.path}: refused: {why}; nothing in it was executed; give another file"
        )

    def _zip(self):
        """The value in torch.save's second format: an uncompressed zip of data.pkl and the
        storages.
        """
        archive = zipfile.ZipFile(self.path)
        names = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(
            info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size
            for info in names.values()
        ):
            raise Refused("it is a zip that torch.save did not write")

        def read(name: str) -> bytes:
            self.budget.copy(names[name].file_size)
            return archive.read(names[name])

        if "byteorder" in names and read("byteorder") != b"little":
            raise Refused("its bytes are not in little-endian order")

        def persistent(pid: tuple) -> Storage:
            key, dtype, numel = _storage(pid)
            return storages.setdefault(key, Storage(dtype, numel, partial(read, f"data/{key}")))

        storages = {}
        pickled = io.BytesIO(read("data.pkl"))
        return _Machine(pickled, GLOBALS, self.budget, persistent, self.strange).run()

    @property
    def operations(self) -> int:
        """How many operations the file has."""
        return MAX_OPERATIONS - self.budget.operations

    @staticmethod
    def is_tensor(value) -> bool:
        """Whether a value is a tensor, a parameter or a NumPy array of numbers."""
        if type(value) is not Call:
            return False
        return value.name in (TENSOR, *PARAMETERS) or _array_dtype(value) is not None

    def tensor(self, value: Call) -> Tensor:
        """The tensor, parameter or array, on the CPU, in memory of its own; raises PickleError."""
        if type(value) is Call and value.name in ARRAYS:
            return torch.from_numpy(self.array(value))
        try:
            _check_known(value)
            if value.name in PARAMETERS:
                value = _is(value.args[0], Call)
            storage, offset, size, stride = value.args[:4]
            if value.name != TENSOR or len(_is(size, tuple)) > 8:
                raise Refused("it is damaged (a tensor is not as torch.save writes it)")
            numel = prod(_is(n, int) for n in size)
            is_larger = numel > _is(storage, Storage).numel  # as an expanded tensor is
            if is_larger and numel * storage.dtype.itemsize > self.limit:
                raise Refused("a tensor is larger than its storage, and than the file could hold")
            return storage.elements.as_strided(size, _is(stride, tuple), _is(offset, int)).clone(
                memory_format=torch.contiguous_format
            )
        except Exception as error:
            raise self.refuse(error) from error

    def array(self, value: Call) -> np.ndarray:
        """A NumPy array of numbers, such as CIFAR's images, in this machine's byte order and memory
        of its own; raises PickleError.
        """
        try:
            if type(value) is not Call or value.name not in ARRAYS:
                raise Refused("it is damaged (something should be an array)")
            dtype = _array_dtype(value)
            if dtype is None:
                raise Refused("an array in it is not of numbers")
            _, shape, _, fortran, data = cast("tuple", value.state)
            data = data.encode("latin1") if type(data) is str else _is(data, bytes)
            numbers = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
            return numbers.astype(dtype.newbyteorder("="), order="C")
        except Exception as error:
            raise self.refuse(error) from error

    def plain(self, value):
        """A number, string, truth value or None, or a list of them; NumPy's become Python's.

        It raises PickleError for others.
        """
        try:
            if type(value) not in (list, tuple):
                return _scalar(value)
            self.budget.operate(len(value))
            return [_scalar(item) for item in value]
        except Exception as error:
            raise self.refuse(error) from error


def _dtype(value) -> np.dtype | None:
    """NumPy's type of numbers that a pickle describes; None of other types."""
    if type(value) is not Call or value.name != "numpy.dtype" or type(value.state) is not tuple:
        return None
    order, word = value.state[1:2], value.args[:1]
    if not all(type(part) is str for part in order + word):
        return None
    name = "".join(order + word)
    return np.dtype(name) if re.fullmatch("[<>|=]?(b1|[iu][1248]|f[248])", name) else None


def _array_dtype(value: Call) -> np.dtype | None:
    """The type of an array's numbers; None of an array of others, and of what is no array."""
    state = value.state
    if value.name not in ARRAYS or type(state) is not tuple or len(state) != 5:
        return None
    return _dtype(state[2])


def _scalar(value):
    if type(value) is Call and value.name in SCALARS:
        dtype, data = value.args
        numbers = _dtype(dtype)
        if numbers is not None:
            return np.frombuffer(data, numbers, 1)[0].item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    _check_known(value)
    raise Refused(f"it is damaged (a {type(value).__name__} should be a number or a word)")


def _check_known(value) -> None:
    """Raise Refused, with its name, for an object or a name that no saved network needs."""
    if type(value) in (Call, Global) and value.name not in GLOBALS:
        raise Refused(unneeded(value.name))
