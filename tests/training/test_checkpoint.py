import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tdkern
from helpers import DATA
from tdkern.families import FAMILIES
from tdkern.losses import EDMLoss
from tdkern.training import CheckpointError, checkpoint, load_network
from tdkern.training.checkpoint import SNAPSHOT, STATE, clean, find, kimg, read, write

SPEC = FAMILIES["edm"].network(EDMLoss(), "ddpmpp", 8, 3, 2, cbase=4, cres=[1], dropout=0.1)
NETWORK = SPEC.to_json()


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(4, 3, generator=generator),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "step": torch.tensor(7.0),
        "last": torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
        "count": torch.arange(3),
    }


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in ours
    )


@pytest.fixture
def snapshot(tmp_path):
    torch.manual_seed(1)
    net = SPEC.build()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)  # newly made, the output layer is nearly zero
    return net, write(
        tmp_path,
        SNAPSHOT,
        2500096,
        net.state_dict(),
        {"step": 9, "network": NETWORK, "options": {}},
    )


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path, STATE, 512, tensors(), {"step": 4, "options": {"lr": 0.001}})
    assert path == tmp_path / "training-state-000000.512"
    assert sorted(file.name for file in path.iterdir()) == ["meta.json", "tensors.safetensors"]
    meta, loaded = read(path, STATE)
    assert same(loaded, tensors())
    assert meta == {
        "format": 4,
        "kind": STATE,
        "tdkern": tdkern.__version__,
        "torch": torch.__version__,
        "nimg": 512,
        "step": 4,
        "options": {"lr": 0.001},
    }
    assert os.listdir(tmp_path) == [path.name]


def test_files_are_as_readable_as_the_users_others(tmp_path):
    path = write(tmp_path, STATE, 512, tensors(), {})
    (tmp_path / "other").write_text("")
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "other").stat().st_mode}


def test_a_checkpoint_that_is_there_is_kept(tmp_path):
    path = write(tmp_path, STATE, 512, tensors(), {"step": 4})
    assert write(tmp_path, STATE, 512, tensors(seed=1), {"step": 4}) == path
    assert same(read(path, STATE)[1], tensors())


def test_names_sort_by_image():
    counts = [0, 8, 512, 999, 1000, 1024, 50176, 200_000_000]
    names = [kimg(count) for count in counts]
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    assert kimg(50176) == "000050.176"


def test_the_newest_of_a_run_is_found(tmp_path):
    for nimg in (512, 50176, 1024):
        write(tmp_path, SNAPSHOT, nimg, tensors(), {})
    assert find(tmp_path, SNAPSHOT) == tmp_path / "network-snapshot-000050.176"
    assert (
        find(tmp_path / "network-snapshot-000000.512", SNAPSHOT)
        == tmp_path / "network-snapshot-000000.512"
    )
    with pytest.raises(CheckpointError, match=r"no training-state-\* in it"):
        find(tmp_path, STATE)


def test_clean_removes_leftovers_and_nothing_else(tmp_path):
    write(tmp_path, SNAPSHOT, 512, tensors(), {})
    (tmp_path / "stats.jsonl").write_text("{}")
    before = sorted(os.listdir(tmp_path))
    shutil.copytree(tmp_path / before[0], tmp_path / ".network-snapshot-000001.024.tmp")
    (tmp_path / ".reals.png.tmp").write_text("")
    clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_network_comes_back_from_its_snapshot(tmp_path, snapshot):
    net, path = snapshot
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 3.0]), torch.eye(2)
    expected = net.eval()(x, sigma, labels)
    for place in (path, tmp_path, str(path) + "/"):
        loaded, meta = load_network(place)
        assert meta["network"] == NETWORK
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert torch.equal(loaded(x, sigma, labels), expected)


# a run of flow matching with TD that tdkern wrote before a thing had one name everywhere
FORMAT3 = DATA / "format3"
# what tdkern train wrote before there was augmentation: 10 images, 3 classes, 2 steps
FORMAT1 = DATA / "format1"


@pytest.mark.parametrize(
    "file, written, changed",
    [
        ("tensors.safetensors", b'"F32"', b'"I32"'),
        ("meta.json", b'"precond": "flow"', b'"precond": "flox"'),
        ("meta.json", b'"lr": 0.001', b'"lr": 0.002'),
    ],
)
def test_a_change_in_format_3_is_found(tmp_path, file, written, changed):
    """Its checksums are of what was written, under the names that things had then."""
    path = tmp_path / "network-snapshot-000000.016"
    shutil.copytree(FORMAT3 / path.name, path)
    net, meta = load_network(path)
    assert meta["format"] == 4 and type(net).__name__ == "Denoiser"
    assert meta["options"]["loss"]["eta"] == 0.5 and meta["options"]["keep_every"] == 3
    data = (path / file).read_bytes()
    assert written in data
    (path / file).write_bytes(data.replace(written, changed))
    with pytest.raises(CheckpointError, match=rf"damaged .*{file} is not what was written"):
        load_network(path)


def test_a_snapshot_of_format_1_is_read():
    net, meta = load_network(FORMAT1)
    assert (
        meta["format"] == 4
        and meta["network"]["model_arguments"]["augment_dim"] == 0
        and meta["options"]["augment"] == 0
    )
    assert not hasattr(net.model.map_augment, "weight")
    stored = safetensors.torch.load_file(
        FORMAT1 / "network-snapshot-000000.016" / "tensors.safetensors"
    )
    assert same(net.state_dict(), stored)
    assert net(torch.randn(2, 3, 8, 8), 1.0, torch.eye(3)[:2]).isfinite().all()


def test_a_snapshot_of_format_2_is_read():
    path = FORMAT1.with_name("format2")
    net, meta = load_network(path)
    stored = safetensors.torch.load_file(
        path / "network-snapshot-000000.016" / "tensors.safetensors"
    )
    assert meta["format"] == 4 and "checksums" not in meta and same(net.state_dict(), stored)


def _edit(path, **changes):
    """Change meta.json, and its checksums with it."""
    meta = json.loads((path / "meta.json").read_text())
    meta = {name: value for name, value in (meta | changes).items() if value is not None}
    meta["checksums"] = {
        "meta.json": checkpoint._digest(meta),
        "tensors.safetensors": checkpoint.sha256(path / "tensors.safetensors"),
    }
    (path / "meta.json").write_text(json.dumps(meta))


def _cut(path, name):
    file = path / name
    file.write_bytes(file.read_bytes()[:-20])


def _change_tensor(path, name, tensor):
    file = path / "tensors.safetensors"
    loaded = safetensors.torch.load_file(file)
    loaded = {key: value.clone() for key, value in loaded.items() if key != name} | (
        {} if tensor is None else {name: tensor}
    )
    safetensors.torch.save_file(loaded, file)
    _edit(path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: shutil.rmtree(path), "cannot be read .*No such file.*meta.json"),
        (lambda path: (path / "meta.json").unlink(), "cannot be read .*No such file.*meta.json"),
        (lambda path: (path / "tensors.safetensors").unlink(), "cannot be read .*No such file"),
        (lambda path: _cut(path, "meta.json"), r"damaged \(JSONDecodeError"),
        (
            lambda path: (_cut(path, "tensors.safetensors"), _edit(path)),
            r"damaged \(SafetensorError",
        ),
        (
            lambda path: ((path / "tensors.safetensors").write_bytes(b""), _edit(path)),
            r"damaged \(SafetensorError",
        ),
        (
            lambda path: (path / "meta.json").write_text("[]"),
            "meta.json does not describe a network-snapshot",
        ),
        (lambda path: _edit(path, kind=STATE), "meta.json does not describe a network-snapshot"),
        (
            lambda path: _edit(path, format=5, tdkern="9.0"),
            r"in format 5 of tdkern 9.0; tdkern .* reads up to format 4; update it",
        ),
        (lambda path: _edit(path, format=0), r"damaged \(KeyError: 0\)"),
        (lambda path: _edit(path, format="new"), r"damaged \(TypeError"),
        (lambda path: _edit(path, format=1, network=None), r"damaged \(KeyError: 'network'\)"),
        (lambda path: _edit(path, format=None), r"damaged \(KeyError"),
        (lambda path: _edit(path, network=None), "meta.json does not describe a network"),
        (
            lambda path: _edit(path, network=NETWORK | {"model": "os.system"}),
            r"meta.json does not describe a network \(ValueError: NetworkSpec: model must be",
        ),
        (
            lambda path: _edit(path, network=NETWORK | {"depth": 3}),
            r"meta.json does not describe a network \(TypeError",
        ),
        (
            lambda path: _edit(path, network=NETWORK | {"label_dim": 10**9}),
            r"meta.json does not describe a network \(ValueError: NetworkSpec: its images or "
            r"classes are not its U-Net's",
        ),
        (
            lambda path: _edit(path, network=NETWORK | {"class": "no"}),
            r"meta.json does not describe a network \(ValueError: NetworkSpec: class must be",
        ),
        (
            lambda path: _edit(
                path,
                network=NETWORK
                | {
                    "label_dim": 3,
                    "model_arguments": NETWORK["model_arguments"] | {"label_dim": 3},
                },
            ),
            r"does not match the network: model.map_label.weight must be \[4, 3\], got \[4, 2\]",
        ),
        (
            lambda path: _change_tensor(path, "model.map_layer0.bias", None),
            r"does not match the network: model.map_layer0.bias must be \[16\], got nothing",
        ),
        (
            lambda path: _change_tensor(path, "model.extra", torch.zeros(2)),
            r"does not match the network: model.extra must be nothing, got \[2\]",
        ),
    ],
)
def test_a_bad_snapshot_is_refused(snapshot, damage, message):
    path = snapshot[1]
    damage(path)
    with pytest.raises(CheckpointError, match=f"network-snapshot-002500.096: {message}"):
        load_network(path)


def _half_a_file(tensors, file):
    Path(file).write_bytes(safetensors.torch.save(tensors)[:100])
    os.kill(os.getpid(), signal.SIGKILL)


def _killed(action, monkeypatch, module, name, call):
    """Run `action` in a child that is killed at that call of module.name; returns whether it got
    there.
    """
    child = os.fork()
    if child == 0:
        real, calls = getattr(module, name), iter(range(1000))
        if module is safetensors.torch:
            replacement = _half_a_file
        else:

            def replacement(*args, **kwargs):
                if next(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

        monkeypatch.setattr(module, name, replacement)
        action()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


POINTS = [(os, "fsync", call) for call in range(5)] + [
    (os, name, 0) for name in ("replace", "rename", "open", "close")
]
POINTS += [(shutil, "copymode", 0), (safetensors.torch, "save_file", 0)]


@pytest.mark.parametrize(
    "module, name, call", POINTS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_kill_while_writing_leaves_the_old_and_no_half(tmp_path, monkeypatch, module, name, call):
    write(tmp_path, STATE, 512, tensors(), {"step": 1})

    def step():
        write(tmp_path, STATE, 1024, tensors(seed=1), {"step": 2})

    assert _killed(step, monkeypatch, module, name, call)
    assert same(read(tmp_path / "training-state-000000.512", STATE)[1], tensors())
    newest = find(tmp_path, STATE)
    meta, loaded = read(newest, STATE)
    assert same(loaded, tensors(seed=meta["step"] - 1))
    clean(tmp_path)
    assert not list(tmp_path.glob(".*"))
    step()  # and the next attempt succeeds
    assert same(read(tmp_path / "training-state-000001.024", STATE)[1], tensors(seed=1))


@pytest.mark.parametrize(
    "module, name, call",
    [
        (os, "rename", 0),
        (shutil, "rmtree", 0),
        (os, "unlink", 0),
        (os, "unlink", 1),
        (os, "rmdir", 0),
    ],
)
def test_a_kill_while_removing_leaves_no_half(tmp_path, monkeypatch, module, name, call):
    path = write(tmp_path, STATE, 512, tensors(), {"step": 1})
    assert _killed(lambda: checkpoint.remove(path), monkeypatch, module, name, call)
    if path.exists():
        assert same(read(path, STATE)[1], tensors())
    clean(tmp_path)
    assert not list(tmp_path.glob(".*"))
