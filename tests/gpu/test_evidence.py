"""The GPU's evidence (bench/gpu/evidence.sh) without one: its rehearsal through its script, what
travels, and that leases of any length together give what one long lease gives.
"""

import contextlib
import json
import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import ROOT
from helpers.imports import SITE, check_imports
from helpers.tiny import data_set, pixels
from tdkern.data import ImageDataset
from tdkern.evaluation.classifier import Classifier
from tdkern.evaluation.detectors import write_detector
from tdkern.losses import Loss

sys.path += [str(ROOT / "bench"), str(ROOT / "bench/gpu")]

import evidence
import evidence_table
import packing
import states
import trials

pytestmark = pytest.mark.xdist_group("evidence")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The images that are carried, packed by the command."""
    folder = tmp_path_factory.mktemp("carried")
    labels = [i % 10 for i in range(20)]
    source = data_set(folder / "png.zip", pixels(20, (3, 32, 32)), labels)
    command = [sys.executable, ROOT / "bench/gpu/packing.py", source, folder / "images.zip.gz"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and " bytes\n" in done.stdout, done.stderr
    source.unlink()
    torch.manual_seed(0)
    record = {"name": "cifar10", "width": 4, "classes": 10, "resolution": 32}
    write_detector(folder / "detector.safetensors", Classifier(4, 10).eval(), record)
    return folder


# ---- the rehearsal ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(folder):
    """A dry run under the hook that refuses what a GPU machine lacks."""
    out = folder / "out"
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(SITE),
        "TDKERN_IMPORTS": str(folder / "imports"),
        "TDKERN_COMMIT": "abc",
    }
    command = [ROOT / "bench/gpu/evidence.sh", "--dry", "--seconds", "900", "--from", folder, out]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_dry_run(dry):
    """A line for each method and number of steps, and what it was measured on."""
    out, text = dry
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "plan.json"}
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    found = [(line["seed"], line["method"], line["steps"]) for line in lines]
    names = [trials.EDM, trials.LONGER, trials.TD, trials.WINDOWED]
    assert found == [(0, name, steps) for name in names for steps in trials.BUDGETS]
    plan = json.loads((out / "plan.json").read_text())
    for line in lines:
        longer = line["method"] == trials.LONGER
        assert line["images"] == 2 * plan["longer" if longer else "steps"] and line["batch"] == 2
        assert line["frechet_cifar10"] > 0 and np.isfinite(line["kernel_cifar10"])
        assert line["commit"] == "abc" and line["torch"] == torch.__version__
        assert line["skipped"] == 0 and not line["cuda_graph"] and not line["compile"]
        assert str(line) in text
    assert len({line["frechet_cifar10"] for line in lines}) == len(lines)
    assert len({line["detector"] for line in lines}) == len({line["date"] for line in lines}) == 1


def test_it_imports_only_what_a_gpu_machine_has(dry, folder):
    names = ("evidence", "trials", "states", "packing", "campaign")
    check_imports(folder / "imports", [f"bench/gpu/{name}.py" for name in names])


def test_what_is_missing_is_named(tmp_path):
    lease = trials.Lease(tmp_path, 0.0)
    with pytest.raises(ValueError, match=r"images\.zip\.gz: is not there; make it with "):
        trials.run(lease, tmp_path)


def test_a_build_that_fails_ends_it(tmp_path, monkeypatch, capsys):
    def build(at):
        raise evidence.campaign.Failed("no compiler", tail="its last words")

    monkeypatch.setattr(evidence.campaign, "STAGES", {"build": build})
    assert evidence.main(["--from", str(tmp_path), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "FAILED: no compiler" in said and "its last words" in said


# ---- what travels -------------------------------------------------------------------------------


def test_images_travel_as_they_are(tmp_path):
    """JPEG files to the bit, others as JPEG; the same zip gives the same file."""
    pixel = np.linspace(0, 255, 32, dtype=np.uint8)
    image = np.stack([np.add.outer(pixel // 2, pixel // 2 * k // 2) for k in range(3)])
    png = data_set(tmp_path / "png.zip", [image.astype(np.uint8)] * 3, [2, 0, 1])
    files = []
    for source in (png, tmp_path / "0.zip"):
        data = packing.packed(source)
        assert data == packing.packed(source)
        dest = tmp_path / f"{len(files)}.zip"
        (tmp_path / "packed").write_bytes(data)
        packing.unpack(tmp_path / "packed", dest)
        files.append(zipfile.ZipFile(dest))
    names = files[0].namelist()
    assert names == files[1].namelist() and names[0].endswith(".jpg")
    assert all(files[0].read(name) == files[1].read(name) for name in names)
    before, after = (ImageDataset(path, use_labels=True) for path in (png, tmp_path / "0.zip"))
    for (ours, label), (theirs, other) in zip(before, after, strict=True):
        assert label.equal(other) and (ours.int() - theirs.int()).abs().float().mean() < 3


def test_too_much_to_carry_is_refused(tmp_path, monkeypatch):
    source = data_set(tmp_path / "png.zip", pixels(2))
    monkeypatch.setattr(packing, "MOST", 100)
    monkeypatch.setattr(sys, "argv", ["packing.py", str(source), str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="more than the 100 that can be carried"):
        packing.main()
    assert not (tmp_path / "new").exists()


def test_earlier_leases_are_brought(tmp_path):
    """Unless OUT goes on with something of its own."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state/meta.json").write_text("{}")
    (tmp_path / "results.jsonl").write_text("old\n")
    for name in ("new", "own"):
        (tmp_path / name).mkdir()
    (tmp_path / "own/plan.json").write_text("own")
    for name in ("new", "own"):
        evidence.bring(tmp_path, tmp_path / name)
    assert (tmp_path / "new/results.jsonl").read_text() == "old\n"
    assert (tmp_path / "new/state/meta.json").exists() and not (tmp_path / "new/plan.json").exists()
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["plan.json"]


# ---- the time -----------------------------------------------------------------------------------


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Pretended:
    """In place of `Run`: steps that take time and nothing else."""

    step_s = {trials.EDM: 0.020, trials.TD: 0.030, trials.WINDOWED: 0.025}  # noqa: RUF012
    begins_s = (40, 15)  # until a run trains, of a method that is new to the machine and of others
    known = set()  # noqa: RUF012

    def __init__(self, options, images, clock, state=None):
        self.clock = clock
        self.method = trials.EDM
        if options.td:
            self.method = trials.WINDOWED if options.loss["td_sigma"] else trials.TD
        step = json.loads(state.read_text())["step"] if state else 0
        average = SimpleNamespace(module=None)
        self.trainer = SimpleNamespace(step=step, ema=average, network=None, options=options)
        clock.now += self.begins_s[self.method in self.known]
        self.known.add(self.method)

    def train(self, count):
        self.clock.now += count * self.step_s[self.method]
        self.trainer.step += count
        return 1e3 * self.step_s[self.method]

    def facts(self):
        return {"images": self.trainer.step * self.trainer.options.batch}


class Leases:
    """Leases one after the other, each on a machine that has what the one before it left."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.count, self.saved = folder, 0, []
        monkeypatch.setattr(trials, "Run", Pretended)
        monkeypatch.setattr(trials, "make_detector", lambda *_: SimpleNamespace(identity="own"))
        monkeypatch.setattr(states, "pack", self.pack)
        monkeypatch.setattr(states, "unpacked", self.unpacked)
        monkeypatch.setattr(trials, "Scorer", self.scorer)
        images = SimpleNamespace(path="images.zip")
        self.trials = lambda lease: trials.Trials(lease, images, SimpleNamespace(identity="own"))

    def pack(self, out, run, trainer):
        (out / "state").mkdir(exist_ok=True)
        (out / "state/meta.json").write_text(json.dumps({"run": run, "step": trainer.step}))
        self.saved.append([*run, trainer.step])

    @contextlib.contextmanager
    def unpacked(self, out, run):
        path = out / "state/meta.json"
        yield path if path.exists() and json.loads(path.read_text())["run"] == run else None

    def scorer(self, images, scale, detector):
        def score(net, network, steps, seed):
            self.clock.now += scale.samples * (2 * steps - 1) * 1e-5
            return {"frechet": 1.0}

        score.detector = detector
        return score

    def lease(self, seconds):
        """What the file of results holds after a lease of so many seconds, which it keeps to."""
        before, self.count = self.folder / str(self.count), self.count + 1
        out = self.folder / str(self.count)
        out.mkdir()
        if before.exists():
            evidence.bring(before, out)
        self.clock = Clock()
        Pretended.known.clear()
        self.trials(trials.Lease(out, seconds, clock=self.clock)).run()
        assert self.clock.now < seconds
        path = out / "results.jsonl"
        lines = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        return lines, json.loads((out / "plan.json").read_text())


@pytest.fixture
def leases(tmp_path, monkeypatch):
    return Leases(tmp_path, monkeypatch)


def places(lines):
    return [(line["seed"], line["method"], line["steps"]) for line in lines]


def test_the_first_lease_holds_one_seed(leases):
    """Nearly to its end; EDM's longer run takes as long as TD's."""
    lines, plan = leases.lease(530)
    names = [trials.EDM, trials.LONGER, trials.TD, trials.WINDOWED]
    assert places(lines) == [(0, name, steps) for name in names for steps in trials.BUDGETS]
    assert leases.clock.now > 530 - 100 and plan["steps"] % trials.CHECK == 0
    assert plan["longer"] == 1.5 * plan["steps"] and plan["setup_s"] == 41.5
    images = {line["method"]: line["images"] for line in lines}
    assert images[trials.EDM] == images[trials.TD] == images[trials.WINDOWED]
    assert images[trials.LONGER] == 1.5 * images[trials.EDM]


@pytest.mark.parametrize("seconds", [250, 400, 444])
def test_leases_of_any_length_add_up(leases, seconds):
    """Every place once, in the order of the seeds, and with the first lease's plan."""
    _, plan = leases.lease(530)
    for _ in range(6):
        lines, later = leases.lease(seconds)
        assert later == plan
    found = places(lines)
    assert len(set(found)) == len(found) > 4 * 4 * 3
    names = [trials.EDM, trials.LONGER, trials.TD, trials.WINDOWED]
    every = [(seed, name, n) for seed in range(9) for name in names for n in trials.BUDGETS]
    assert found == every[: len(found)]
    assert {line["images"] for line in lines if line["method"] == trials.TD} == {
        256 * plan["steps"]
    }
    assert leases.saved  # some lease ended within a run


def test_a_lease_that_is_too_short_does_nothing(leases):
    leases.lease(530)
    lines, _ = leases.lease(530)
    again, _ = leases.lease(50)
    assert again == lines


def test_a_run_that_was_killed_is_done_again(leases):
    """Its state being lost; what it has scored is not scored again."""
    lines, _ = leases.lease(530)
    text = "".join(f"{json.dumps(line)}\n" for line in lines[:6])
    (leases.folder / "1/results.jsonl").write_text(text + '{"seed": 0, "meth')
    for path in (leases.folder / "1").glob("state/*"):
        path.unlink()
    again, _ = leases.lease(530)
    assert again[:6] == lines[:6] and places(again)[:16] == places(lines)
    assert len(set(places(again))) == len(again)


def test_the_first_way_that_works_is_taken(leases, monkeypatch, capsys):
    class Refuses(Pretended):
        def __init__(self, options, *args):
            super().__init__(options, *args)
            if options.compile:
                raise RuntimeError("no compiler")

    monkeypatch.setattr(trials, "Run", Refuses)
    monkeypatch.setattr(trials, "WAYS", trials.WAYS)
    lines, plan = leases.lease(530)
    assert plan["way"] == [False, True] and {line["compile"] for line in lines} == {False}
    assert "does not work here: RuntimeError: no compiler" in capsys.readouterr().out


# ---- the state ----------------------------------------------------------------------------------


@pytest.fixture
def tiny(folder, tmp_path):
    """Makes real runs of a few steps of seed 3."""
    packing.unpack(folder / "images.zip.gz", tmp_path / "images.zip")
    images = trials.Images(tmp_path / "images.zip", torch.device("cpu"))
    own = SimpleNamespace(lease=trials.Lease(tmp_path, 0.0, trials.TINY), images=images)
    plan = trials.Plan(4, 6, trials.TINY.ways[0], 0, 0)

    def begin(method=trials.TD, state=None):
        options = trials.Trials._options(own, plan, 3, method)
        return trials.Run(options, images, Clock(), state)

    return begin


def test_methods_get_the_same_draws(tiny, monkeypatch):
    """The same weights to begin with, images, and noise levels; other seeds get others."""
    seen, evaluate = {}, Loss.evaluate

    def watched(loss, net, target, batch, *args, **named):
        seen[method].append((batch.x0, batch.sigma))
        return evaluate(loss, net, target, batch, *args, **named)

    monkeypatch.setattr(Loss, "evaluate", watched)
    weights = {}
    for method in trials.METHODS:
        seen[method], run = [], tiny(method)
        weights[method] = [param.clone() for param in run.trainer.net.parameters()]
        run.train(3)
    for method in (trials.TD, trials.WINDOWED):
        for ours, theirs in zip(weights[method], weights[trials.EDM], strict=True):
            assert ours.equal(theirs)
        for (x0, sigma), (other, level) in zip(seen[method], seen[trials.EDM], strict=True):
            assert x0.equal(other) and sigma.equal(level)
    (first, _), (second, _), _ = seen[trials.EDM]
    assert not first.equal(second)


def test_a_run_goes_on_from_its_parts(tiny, tmp_path, monkeypatch):
    """To the same bits, and only the run that the state is of."""
    monkeypatch.setattr(states, "PART", 20_000)
    straight, ours = tiny(), tiny()
    straight.train(4)
    ours.train(2)
    for _ in range(2):  # the second takes the place of the first
        states.pack(tmp_path, [3, trials.TD], ours.trainer)
    assert len(list((tmp_path / "state").glob("tensors-*"))) > 10
    assert not (tmp_path / "state.new").exists()
    with states.unpacked(tmp_path, [3, trials.EDM]) as state:
        assert state is None
    with states.unpacked(tmp_path, [3, trials.TD]) as state:
        ours = tiny(state=state)
    assert ours.trainer.step == 2
    ours.train(2)
    for name, tensor in straight.trainer.tensors().items():
        assert tensor.equal(ours.trainer.tensors()[name]), name


def test_a_damaged_state_is_begun_anew(tiny, tmp_path, capsys):
    ours = tiny()
    ours.train(1)
    states.pack(tmp_path, [3, trials.TD], ours.trainer)
    part = tmp_path / "state/tensors-0"
    part.write_bytes(part.read_bytes()[:-1])
    own = SimpleNamespace(lease=SimpleNamespace(out=tmp_path, clock=Clock()), images=ours.images)
    again = trials.Trials._run(own, ours.trainer.options, [3, trials.TD])
    assert again.trainer.step == 0 and "it begins anew: " in capsys.readouterr().out


# ---- the table ----------------------------------------------------------------------------------


def scored(seed, method, steps, factor, **more):
    """A line of results: the method's share of what EDM scores on the seed."""
    scores = {"frechet_cifar10": (20 + seed) * factor, "kernel_cifar10": 0.02 * factor}
    facts = {"images": 1000, "batch": 256, "parameters": 1_240_000, "step_ms": 10 * factor}
    facts |= {"memory_mib": 900, "samples": 5000, "detector": "cifar10-abc", "device": "H100"}
    place = {"seed": seed, "method": method, "steps": steps}
    return place | scores | facts | {"torch": "2.11"} | more


def results_of(path, seeds):
    """A file of results in which TD scores 5 % less than EDM, and EDM's longer training 10 %."""
    factors = {trials.EDM: 1.0, trials.LONGER: 0.9, trials.TD: 0.95, trials.WINDOWED: 0.9}
    lines = [
        scored(seed, method, steps, factor)
        for seed in range(seeds)
        for method, factor in factors.items()
        for steps in trials.BUDGETS
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return lines


def test_table(tmp_path):
    results_of(tmp_path / "gpu.jsonl", 5)
    text = evidence_table.markdown(tmp_path / "gpu.jsonl")
    for line in (
        "H100, torch 2.11; a SongUNet of 1.24 million parameters, batches of 256; 5,000 images of "
        "each of 5 seeds, by features of cifar10-abc; from `bench/results/evidence/gpu.jsonl`",
        "| Fréchet distance by steps | 5 | 9 | 12 | 18 |",
        "| EDM | 22 | 22 | 22 | 22 |",
        f"| TD+EDM − EDM, % |{' -5.0 [-5.0, -5.0] |' * 4}",
        f"| TD+EDM − EDM, TD's compute, % |{' +5.6 [+5.6, +5.6] |' * 4}",
        f"| windowed TD+EDM − EDM, TD's compute, % |{' +0.0 [+0.0, +0.0] |' * 4}",
        "| kernel distance by steps | 5 | 9 | 12 | 18 |",
        "| TD+EDM | 1,000 | 9.50 | 0.95 | 900 |",
    ):
        assert line in text.splitlines()


def test_table_leaves_out_what_is_not_whole(tmp_path):
    """A seed that is cut off, and one with a failure, are in no mean."""
    path = tmp_path / "gpu.jsonl"
    lines = results_of(path, 6)
    lines[2] = {**lines[2], "failure": "not finite"}
    text = "".join(f"{json.dumps(line)}\n" for line in lines[:-1])
    path.write_text(text)
    text = evidence_table.markdown(path)
    assert "each of 4 seeds" in text and "(not whole, and in no score: seeds 0, 5)" in text
    assert "| EDM | 22.5 | 22.5 | 22.5 | 22.5 |" in text
