"""What hostile and damaged files come to: refused in one line, and nothing of them is run."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch

from helpers import DATA
from tdkern.integrations import PickleError, PickleFile, convert

SNAPSHOT = DATA / "edm_snapshot_tiny.pkl"


class Evil:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def storage_bytes(obj):
    """`obj` in the place of a storage that torch.save wrote into a pickle."""
    stream = io.BytesIO()
    torch.save(obj, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def opcodes(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


def glob(name):
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage_from(data):
    """The call that reads a storage from bytes."""
    return (
        glob("torch.storage._load_from_bytes")
        + b"B"
        + struct.pack("<I", len(data))
        + data
        + b"\x85R"
    )


def tensor_of(numel, size, stride, offset=b"K\x00", count=None):
    """A pickle {"a": tensor} with a storage of `numel` float32 that says it has `count`, viewed
    with `size` and `stride`.
    """
    data = storage_bytes(torch.zeros(numel)._typed_storage())
    if count is not None:
        head, tail = data.rsplit(b"K" + bytes([numel]), 1)
        data = (
            head
            + b"\x8a\x08"
            + struct.pack("<q", count)
            + tail[: -8 - 4 * numel]
            + struct.pack("<q", count)
            + tail[-4 * numel :]
        )
    pack = [b"\x8a\x08" + struct.pack("<q", n) for n in (*size, *stride)]
    sizes, strides = (
        b"(" + b"".join(part) + b"t" for part in (pack[: len(size)], pack[len(size) :])
    )
    return opcodes(
        b"}",
        text("a"),
        glob("torch._utils._rebuild_tensor_v2"),
        b"(",
        storage_from(data),
        offset,
        sizes,
        strides,
        b"\x89Nt",
        b"Rs",
    )


def module(children, parameters=b"}", more=b""):
    """The record of a module of no class of EDM's, from the pickles of its dicts."""
    state = (
        b"}"
        + text("_parameters")
        + parameters
        + b"s"
        + text("_buffers")
        + b"}s"
        + text("_modules")
        + children
        + b"s"
        + more
    )
    record = glob("torch_utils.persistence._reconstruct_persistent_obj")
    return record + b"}" + text("class_name") + text("A") + b"s" + text("state") + state + b"s\x85R"


def nested_modules(levels):
    """Modules each of which holds the next one twice: 2^levels paths."""
    inner = module(b"}")
    for _ in range(levels):
        inner = module(b"}" + text("x") + inner + b"q\x00s" + text("y") + b"h\x00s")
    return opcodes(b"}", text("ema"), inner, b"s")


def nested_in_two(levels, inner, holder):
    """Containers each of which holds the next one twice, down to `inner`: 2^levels paths."""
    for _ in range(levels):
        inner = holder(inner + b"q\x00", b"h\x00")
    return opcodes(inner)


def dict_of_two(a, b):
    return b"}(" + text("x") + a + text("y") + b + b"u"


def list_of_two(a, b):
    return b"](" + a + b + b"e"


def tuple_of_two(a, b):
    return a + b + b"\x86"


def array_of(numel, data):
    """A NumPy array of bytes that says it has `numel` of them, from its own operations."""
    size, length = struct.pack("<q", numel), struct.pack("<I", len(data))
    dtype = glob("numpy.dtype") + text("u1") + b"\x85R(K\x03" + text("|") + b"tb"
    made = glob("numpy.core.multiarray._reconstruct") + glob("numpy.ndarray") + b"\x85R"
    return made + b"(K\x01\x8a\x08" + size + b"\x85" + dtype + b"\x89B" + length + data + b"tb"


EMPTY_TENSOR = tensor_of(2, [0], [1])[2:-1]  # a dict of a tensor of no number


HOSTILE = {
    "os.system": (
        lambda flag: pickle.dumps({"ema": Evil(os.system, f"touch {flag}")}),
        r"it names '(posix|nt).system', which no saved network needs",
    ),
    "eval": (
        lambda flag: pickle.dumps(Evil(eval, f"open({str(flag)!r}, 'w')")),
        "it names 'builtins.eval'",
    ),
    "exec, protocol 0": (lambda flag: b"cbuiltins\nexec\n(S'1'\ntR.", "it names 'builtins.exec'"),
    "getattr, as of torch": (
        lambda flag: opcodes(glob("torch.load"), text(str(flag)), b"\x85R"),
        "it names 'torch.load'",
    ),
    "in an argument": (
        lambda flag: pickle.dumps(OrderedDict(a=Evil(os.system, f"touch {flag}"))),
        r"it names '(posix|nt).system'",
    ),
    "in a storage": (
        lambda flag: opcodes(storage_from(storage_bytes(Evil(os.system, f"touch {flag}")))),
        r"it names '(posix|nt).system'",
    ),
    "a storage in a storage": (
        lambda flag: opcodes(
            storage_from(
                storage_bytes(torch.zeros(2)._typed_storage()).replace(
                    b"ctorch\nFloatStorage\n", b"ctorch.storage\n_load_from_bytes\n"
                )
            )
        ),
        "it names 'torch.storage._load_from_bytes'",
    ),
    "a plain pickle as a storage": (
        lambda flag: opcodes(storage_from(opcodes(b"K\x01"))),
        "a storage is not as torch.save writes it",
    ),
    "a call of a value": (
        lambda flag: opcodes(text("eval"), text("1"), b"\x85R"),
        "a Global should be where a str is",
    ),
    "a name that is no string": (
        lambda flag: opcodes(b"K\x01K\x02\x93"),
        "a str should be where a int is",
    ),
    "INST": (lambda flag: b"(S'1'\nios\nsystem\n.", "it has the operation"),
    "OBJ": (
        lambda flag: opcodes(b"(", glob("collections.OrderedDict"), b"o"),
        "it has the operation OBJ, which no saved network needs",
    ),
    "EXT1": (lambda flag: opcodes(b"\x82\x01"), "it has the operation EXT1"),
    "DUP": (lambda flag: opcodes(b"]", b"2a" * 10), "it has the operation DUP"),
    "a persistent id": (lambda flag: opcodes(b"K\x01\x85Q"), "it has the operation BINPERSID"),
    "state of a global": (
        lambda flag: opcodes(glob("collections.OrderedDict"), b"}b"),
        "a Call should be where a Global is",
    ),
    "underflow": (lambda flag: opcodes(b"\x86"), "it is damaged"),
    "underflow of a mark": (lambda flag: opcodes(b"t"), "it is damaged"),
    "an unknown memo": (lambda flag: opcodes(b"h\x07"), "it is damaged"),
    "nothing": (lambda flag: opcodes(), "it is damaged"),
    "no stop": (lambda flag: b"\x80\x04}", "it is damaged"),
    "an unhashable key": (lambda flag: opcodes(b"}]K\x01s"), "a list is a key"),
    "an odd number of items": (lambda flag: opcodes(b"}(K\x01u"), "it is damaged"),
    "8 EiB of bytes": (
        lambda flag: b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1) + b"x.",
        "it is damaged",
    ),
    "2 GiB of bytes": (
        lambda flag: b"\x80\x04B" + struct.pack("<I", 2**31) + b"x.",
        "it is damaged",
    ),
    "a memo of 2^32": (
        lambda flag: opcodes(b"]r" + struct.pack("<I", 2**32 - 1)),
        "no tensors in it",
    ),
    "deep lists": (lambda flag: opcodes(b"]" * 100_000, b"a" * 99_999), "no tensors in it"),
    "deep tuples": (lambda flag: opcodes(b")" + b"\x85" * 150_000), "no tensors in it"),
    "a deep tuple as a key": (
        lambda flag: opcodes(b"})" + b"\x85" * 150_000 + b"Ns"),
        "a tuple is a key",
    ),
    "deep dicts": (
        lambda flag: opcodes((b"}" + text("a")) * 5_000, b"}", b"s" * 5_000),
        "nested too deep",
    ),
    "a dict in itself": (lambda flag: opcodes(b"}q\x00" + text("a") + b"h\x00s"), "in two places"),
    "2^30 modules": (lambda flag: nested_modules(30), "in two places"),
    "2^30 dicts": (lambda flag: nested_in_two(30, b"}", dict_of_two), "in too many places"),
    "2^30 dicts of a tensor": (
        lambda flag: nested_in_two(30, EMPTY_TENSOR, dict_of_two),
        "in too many places",
    ),
    "2^30 lists": (lambda flag: nested_in_two(30, b"]", list_of_two), "no tensors in it"),
    "2^30 lists of a tensor": (
        lambda flag: nested_in_two(30, EMPTY_TENSOR, list_of_two),
        "in too many places",
    ),
    "2^30 tuples of a tensor": (
        lambda flag: nested_in_two(30, EMPTY_TENSOR, tuple_of_two),
        "in too many places",
    ),
    "a list in itself": (lambda flag: opcodes(b"]q\x00h\x00a"), "no tensors in it"),
    "a list of a tensor, in itself": (
        lambda flag: opcodes(b"]q\x00", EMPTY_TENSOR, b"ah\x00a"),
        "in two places, one inside the other",
    ),
    "deep lists of a tensor": (
        lambda flag: opcodes(b"]" * 5_000, EMPTY_TENSOR, b"a" * 5_000),
        "nested too deep",
    ),
    "many long names": (
        lambda flag: opcodes(
            (b"}" + text("a" * 300)) * 3,
            b"}(" + text("a") + EMPTY_TENSOR + b"q\x00",
            b"".join(text(str(i)) + b"h\x00" for i in range(9999)) + b"u",
            b"s" * 3,
        ),
        "its tensors are larger than the file, with their names",
    ),
    "one number expanded to 2^40": (
        lambda flag: tensor_of(1, [2**20, 2**20], [0, 0]),
        "a tensor is larger than its storage, and than the file could hold",
    ),
    "an array that is larger than its bytes": (
        lambda flag: opcodes(b"]", array_of(2**40, b"\x00" * 8), b"a"),
        "it is damaged",
    ),
    "an array in a hundred places": (
        lambda flag: opcodes(
            b"](", array_of(2**16, b"\x00" * 2**16), b"q\x00", b"h\x00" * 99, b"e"
        ),
        "its tensors are larger than the file",
    ),
    "POP": (lambda flag: opcodes(b"N0"), "it has the operation POP"),
    "a tensor of 2^40": (lambda flag: tensor_of(2, [2**40], [0]), "larger than its storage"),
    "a tensor beyond its storage": (lambda flag: tensor_of(2, [2], [2**40]), "it is damaged"),
    "a tensor before its storage": (
        lambda flag: tensor_of(2, [1], [1], offset=b"J\xff\xff\xff\xff"),
        "it is damaged",
    ),
    "a negative size": (lambda flag: tensor_of(4, [-1, -2], [1, 1]), "it is damaged"),
    "a size of words": (
        lambda flag: tensor_of(2, [], []).replace(
            b"(t(t", b"(J\x00\x00\x00\x40" + text("aaaa") + b"t(t"
        ),
        "a int should be where a str is",
    ),
    "a storage of 2^50": (
        lambda flag: tensor_of(2, [1], [1], count=2**50),
        "what it asks to copy is larger than the file",
    ),
    "the same bytes a thousand times": (
        lambda flag: opcodes(
            glob("_codecs.encode"),
            b"q\x00",
            text("x" * 10**6),
            b"q\x01(",
            b"h\x00h\x01\x85R" * 1000,
            b"t",
        ),
        "what it asks to copy is larger than the file",
    ),
    "the same set a thousand times": (
        lambda flag: opcodes(
            glob("builtins.set"),
            b"q\x00](" + b"NK\x01" * 10_000 + b"eq\x01(",
            b"h\x00h\x01\x85R" * 1000,
            b"t",
        ),
        "it has more than 1,000,000 operations",
    ),
    "integers of one hash": (
        lambda flag: opcodes(
            b"}(",
            *(
                b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N"
                for i in range(100_000)
            ),
            b"u",
        ),
        "a key is an integer beyond 2\\^60",
    ),
    "parameters that two modules share": (
        lambda flag: opcodes(
            b"}",
            text("ema"),
            module(
                b"}"
                + text("a")
                + module(b"}", b"}q\x07")
                + b"s"
                + text("b")
                + module(b"}", b"h\x07")
                + b"s"
            ),
            b"s",
        ),
        "in two places",
    ),
    "a name of a megabyte": (
        lambda flag: tensor_of(2, [2], [1]).replace(text("a"), text("a" * 10**6)),
        "a tensor's name is 'aaaa",
    ),
    "a name of two lines": (
        lambda flag: tensor_of(2, [2], [1]).replace(text("a"), text("a\nb")),
        r"a tensor's name is 'a\\nb'",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(tmp_path, name):
    """Each is refused with one line that names the file, executes nothing, and takes little
    memory.
    """
    make, message = HOSTILE[name]
    path, flag = tmp_path / "hostile.pkl", tmp_path / "executed"
    path.write_bytes(make(flag))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as raised:
            convert(path, tmp_path / "a.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (
        str(raised.value).startswith(f"{path}: ")
        and "\n" not in str(raised.value)
        and len(str(raised.value)) < 400 + len(str(path))
    )
    assert not flag.exists() and os.listdir(tmp_path) == ["hostile.pkl"]
    assert peak < 2**27


def test_the_hostile_pickles_are_what_they_say(tmp_path):
    """The unpickler of Python does execute them: the tests above would see it."""
    flag = tmp_path / "executed"
    pickle.loads(HOSTILE["os.system"][0](flag))
    assert flag.exists()
    flag.unlink()
    pickle.loads(HOSTILE["eval"][0](flag))
    assert flag.exists()
    (tmp_path / "fine.pkl").write_bytes(tensor_of(2, [2], [1]))
    convert(tmp_path / "fine.pkl", tmp_path / "fine.safetensors")
    assert safetensors.torch.load_file(tmp_path / "fine.safetensors")["a"].tolist() == [0, 0]


def test_a_storage_is_read_once(tmp_path, monkeypatch):
    """However many tensors are made of it: a small file could make its reader copy for hours."""
    big = torch.arange(100_000)
    torch.save({str(i): big[i] for i in range(1000)}, tmp_path / "a.pt")
    reads, real = [], zipfile.ZipFile.read
    monkeypatch.setattr(
        zipfile.ZipFile,
        "read",
        lambda archive, info: reads.append(info.filename) or real(archive, info),
    )
    convert(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert sorted(reads) == ["a/byteorder", "a/data.pkl", "a/data/0"]
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["7"].item() == 7


def test_operations_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("tdkern.integrations.pickles.MAX_OPERATIONS", 1000)
    storage = (
        storage_from(storage_bytes(torch.zeros(2)._typed_storage()))
        .replace(b"B", b"q\x00B", 1)
        .replace(b"\x85R", b"q\x01\x85R")
    )
    # four operations that make the storage of its bytes once more, which has many
    again = b"h\x00h\x01\x85R"
    for made, message in (
        (b"]" * 990, "no tensors in it"),
        (b"]" * 1010, "more than 1,000 operations"),
        (storage + again * 5, "no tensors in it"),
        (storage + again * 100, "more than 1,000 operations"),
    ):
        (tmp_path / "a.pkl").write_bytes(opcodes(made))
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda files: files | {"archive/data.pkl": pickle.dumps(Evil(os.system, "exit 1"))},
            r"it names '(posix|nt).system'",
        ),
        (
            lambda files: {
                name: data for name, data in files.items() if not name.endswith("data/0")
            },
            "it is damaged",
        ),
        (
            lambda files: {
                name: data[:4] if name.endswith("data/0") else data for name, data in files.items()
            },
            "it is damaged",
        ),
        (
            lambda files: {
                name: b"big" if name.endswith("byteorder") else data for name, data in files.items()
            },
            "not in little-endian order",
        ),
        (lambda files: {"other/file": b""}, "it is damaged"),
    ],
)
def test_hostile_zips_are_refused(tmp_path, change, message):
    torch.save({"a": torch.ones(3)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        files = {"archive/" + name.partition("/")[2]: good.read(name) for name in good.namelist()}
    for name, compression, made in (
        ("stored", zipfile.ZIP_STORED, change(files)),
        ("bomb", zipfile.ZIP_DEFLATED, files),
        ("claim", zipfile.ZIP_STORED, files),
    ):
        with zipfile.ZipFile(tmp_path / name, "w", compression) as file:
            for entry, data in made.items():
                file.writestr(entry, data)
            if name == "claim":  # the directory is written on closing
                file.infolist()[0].file_size = file.infolist()[0].compress_size = 2**31
        with pytest.raises(
            PickleError,
            match={
                "stored": message,
                "bomb": "a zip that torch.save did not write",
                "claim": "what it asks to copy",
            }[name],
        ):
            convert(tmp_path / name, tmp_path / "a.safetensors")


def test_tensors_that_share_a_storage_cannot_fill_memory(tmp_path):
    big = torch.zeros(10_000)
    torch.save({str(i): big for i in range(100)}, tmp_path / "a.pt")
    with pytest.raises(PickleError, match="its tensors are larger than the file"):
        convert(tmp_path / "a.pt", tmp_path / "a.safetensors")


def test_names_that_collide_are_refused(tmp_path):
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(PickleError, match=r"two tensors are named 'a.b'"):
        convert(tmp_path / "a.pt", tmp_path / "a.safetensors")


def test_damaged_snapshots_are_refused(tmp_path):
    """Cut anywhere it is refused; with bytes changed anywhere, it is refused or read, and nothing
    else.
    """
    data = SNAPSHOT.read_bytes()
    path = tmp_path / "cut.pkl"
    for length in [1, 2, 11, 500, 1500, 60_000, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(PickleError, match=r"cut.pkl: refused: it is damaged"):
            PickleFile(path)
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(15):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), 20):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            convert(path, tmp_path / f"{i}.safetensors")
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
    assert refused > 5
