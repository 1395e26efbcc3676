"""`tdkern train --power-ema` and `tdkern ema`."""

import pytest
import torch

from helpers.runs import start
from helpers.tiny import TINY, options_of, tdkern_
from tdkern.ema import PowerFunctionEMA, posthoc
from tdkern.training import Trainer, load_network
from tdkern.training.checkpoint import AVERAGES, checkpoints, read
from tdkern.training.distributed import this_process

pytestmark = pytest.mark.usefixtures("short_previews")


@pytest.fixture
def run(tmp_path, data):
    """Twelve steps, a snapshot of each second one."""
    changes = {"td": False, "snap": 2, "dump": 0, "lr_rampup_kimg": 0, "power_ema": [0.05, 0.1]}
    return start(options_of(data=data, duration=96e-6, **TINY | changes), tmp_path / "run")


def test_a_network_of_any_width(tmp_path, run):
    found = checkpoints(run, AVERAGES)
    assert [read(path, AVERAGES)[0]["step"] for path in found] == [2, 4, 6, 8, 10, 12]
    files = [path / "tensors.safetensors" for path in found]
    for flags, arguments in (
        (["--sigma-rel", 0.075], (0.075,)),
        (["--sigma-rel", 0.08, "--kimg", 0.080], (0.08, 10)),
    ):
        dst = tmp_path / f"{len(flags)}.safetensors"
        said = tdkern_("ema", run, dst, *flags)
        assert len(said.splitlines()) == 1 and "of 6 snapshots" in said
        state = load_network(dst)[0].state_dict()
        expected = posthoc(files, *arguments)
        assert all(torch.equal(state[name], expected[name]) for name in state)
    tdkern_("generate", "--network", dst, "--outdir", tmp_path / "images", "--seeds", "0-1")
    # nearer to the direct averages of the widths around it than they are to each other
    _, tensors = read(found[-1], AVERAGES)

    def gap(first, second):
        return sum(((a - b) ** 2).sum().item() for a, b in zip(first, second, strict=True)) ** 0.5

    def direct(width):
        return [tensors[f"profiles.{width}.module.{name}"] for name in state]

    made = posthoc(files, 0.075)
    apart = gap(direct("0_05"), direct("0_1"))
    for width in ("0_05", "0_1"):
        assert 0 < gap([made[name] for name in state], direct(width)) < apart


def test_what_is_there_is_not_written_over(tmp_path, run):
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    said = tdkern_("ema", run, tmp_path / "mine.safetensors", "--sigma-rel", 0.05, code=1)
    assert "DST must not be there yet" in said
    assert (tmp_path / "mine.safetensors").read_bytes() == b"mine"


def test_what_cannot_be_made_is_one_line(tmp_path, run):
    dst = tmp_path / "x.safetensors"
    for arguments, message in (
        ([tmp_path, dst, "--sigma-rel", 0.05], "no averages-snapshot-* in it; give a run that was"),
        ([run, dst, "--sigma-rel", 0.5], "sigma_rel must be in (0, 12^-0.5], got 0.5"),
        ([run, dst, "--sigma-rel", 0.05, "--kimg", 1], "at most the newest snapshot's 12, got 125"),
        ([run, tmp_path / "x.pt", "--sigma-rel", 0.05], "path must end in .safetensors"),
    ):
        said = tdkern_("ema", *arguments, code=1)
        assert len(said.strip().splitlines()) == 1 and message in said
    said = tdkern_("ema", run, dst, "--sigma-rel", 0.01)
    assert said.startswith("Warning: posthoc: these snapshots give width 0.01 only to")
    file = checkpoints(run, AVERAGES)[0] / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    said = tdkern_("ema", run, tmp_path / "y.safetensors", "--sigma-rel", 0.05, code=1)
    assert len(said.strip().splitlines()) == 1 and "averages-snapshot-000000.016" in said


def test_the_averages_are_of_the_weights_after_each_step(data):
    """Against PowerFunctionEMA itself, over a run's own weights."""
    options = TINY | {"power_ema": [0.1], "lr_rampup_kimg": 0}
    trainer = Trainer(options_of(data=data, duration=96e-6, **options), this_process())
    expected = PowerFunctionEMA(trainer.net, (0.1,))
    images, labels = zip(*(trainer.dataset[i] for i in range(8)), strict=True)
    for step in range(1, 5):
        trainer.train_step(torch.stack(images), torch.stack(labels))
        expected.update(trainer.net, step)
    ours, theirs = trainer.power.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and trainer.power.step == 4
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)
