"""A state or a line that is damaged is found, and not gone on from."""

import json
import re

import pytest
import safetensors.torch
import torch

from helpers.run_dirs import (
    resume,
    start,
    statistics,
)
from tdkern.training import checkpoint
from tdkern.training.checkpoint import STATE, CheckpointError, find, read

pytestmark = pytest.mark.usefixtures("short_previews")


def test_a_flipped_bit_is_found_and_the_next_older_whole_state_is_named(tmp_path):
    run_dir = start(tmp_path / "run", keep=3)
    for name in ("training-state-000000.024", "training-state-000000.016"):
        file = run_dir / name / "tensors.safetensors"
        data = bytearray(file.read_bytes())
        data[-77] ^= 4
        file.write_bytes(data)
    output = resume(run_dir, "--duration", "40e-6", code=1)
    assert "000000.024: damaged" in output and "training-state-000000.008 is whole" in output
    assert len(output.strip().splitlines()[-1]) == len(output.strip().splitlines()[-1].strip())
    assert "image 8 of 40" in resume(run_dir / "training-state-000000.008", "--duration", "40e-6")


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json"])
def test_every_flipped_bit_is_found(tmp_path, name):
    run_dir = start(tmp_path / "run", duration=8e-6)
    file = find(run_dir, STATE) / name
    whole, trainer_state = file.read_bytes(), find(run_dir, STATE)
    went_on = []
    for place in range(3, len(whole), max(len(whole) // 25, 1)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        file.write_bytes(data)
        try:
            read(trainer_state, STATE)
        except CheckpointError:
            continue
        went_on.append(whole[place - 20 : place + 20])
    # versions, the name's numbers and the options that may change are compared elsewhere
    if name == "meta.json":
        known = (
            "tdkern",
            "torch",
            "nimg",
            "step",
            "data",
            "duration",
            "tick",
            "snap",
            "dump",
            "keep",
            "workers",
            "time_limit",
            "{",
            "\\n",
        )
        went_on = [part for part in went_on if not any(word.encode() in part for word in known)]
    assert went_on == []


def _tensor(name, change):
    def damage(path):
        loaded = {
            key: value.clone()
            for key, value in safetensors.torch.load_file(path / "tensors.safetensors").items()
        }
        loaded[name] = change(loaded[name])
        safetensors.torch.save_file(loaded, path / "tensors.safetensors")

    return damage


def _meta(**changes):
    def damage(path):
        meta = json.loads((path / "meta.json").read_text()) | changes
        (path / "meta.json").write_text(
            json.dumps({key: value for key, value in meta.items() if value != "gone"})
        )

    return damage


FIRST = "model.map_layer0.bias"


@pytest.mark.parametrize(
    "damage, message",
    [
        (_tensor(f"exp_avg.{FIRST}", lambda t: t[:3]), rf"exp_avg.{FIRST} must be \[16\]"),
        (_tensor(f"exp_avg.{FIRST}", lambda t: t * float("nan")), "not finite"),
        (_tensor(f"exp_avg_sq.{FIRST}", lambda t: t - 1), "not finite"),
        (_tensor(f"exp_avg_sq.{FIRST}", lambda t: t + float("inf")), "not finite"),
        (_tensor(f"exp_avg.{FIRST}", torch.Tensor.double), "torch.float32, got .* torch.float64"),
        (_tensor(f"step.{FIRST}", lambda t: t + 1), "not finite"),
        (_tensor(f"step.{FIRST}", lambda t: t[None]), r"must be \[\]"),
        (_tensor(f"net.{FIRST}", torch.Tensor.char), "torch.float32, got torch.int8"),
        (_tensor(f"net.{FIRST}", lambda t: t + 0j), "torch.float32, got torch.complex64"),
        (_tensor(f"ema.{FIRST}", torch.Tensor.half), "torch.float32, got torch.float16"),
        (_tensor(f"target.{FIRST}", lambda t: t / 0), "not finite"),
        (_meta(step="gone"), "step must be an integer"),
        (_meta(step=-1), "step must be an integer"),
        (_meta(step=2.5), "step must be an integer"),
        (_meta(step="4"), "step must be an integer"),
        (_meta(step=10**30), "step must be an integer"),
        (_meta(step=0), "not finite or out of range|do not agree"),
        (_meta(options="gone"), "damaged|does not hold options"),
        (_meta(options=[1]), "damaged|does not hold options"),
        (_meta(format=float("nan")), "damaged"),
        (_meta(format=True), "damaged"),
    ],
)
def test_a_state_that_is_not_what_training_left_is_refused(tmp_path, monkeypatch, damage, message):
    run_dir = start(tmp_path / "run", duration=8e-6)
    damage(find(run_dir, STATE))
    path = find(run_dir, STATE)
    with open(path / "meta.json") as file:
        meta = json.load(file)
    if meta.get("format") == checkpoint.FORMAT:  # as one who wrote it so would have sealed it
        meta["checksums"] = {
            "meta.json": checkpoint._digest(meta),
            "tensors.safetensors": checkpoint.sha256(path / "tensors.safetensors"),
        }
        (path / "meta.json").write_text(json.dumps(meta))
    line = resume(run_dir, "--duration", "16e-6", code=1).strip().splitlines()[-1]
    assert line.startswith("Error: ") and re.search(message, line), line


@pytest.mark.parametrize(
    "line",
    [
        "",
        "\0" * 100,
        "{torn",
        "[1, 2]",
        '{"kimg": "x"}',
        '{"other": 1}',
        "[" * 100_000,
        "\udcff",
        '{"kimg": NaN}',
    ],
)
def test_a_line_that_is_no_statistics_is_dropped(tmp_path, line):
    run_dir = start(tmp_path / "run", duration=16e-6)
    with open(run_dir / "stats.jsonl", "ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
        file.write(b'{"kimg": 0.0')  # and a torn end
    resume(run_dir, "--duration", "24e-6")
    assert [entry["kimg"] for entry in statistics(run_dir)] == [0.008, 0.016, 0.024]
