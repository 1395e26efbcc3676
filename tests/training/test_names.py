"""Names in a run directory: which are checkpoints, which stay, and which are set aside."""

import shutil

import pytest

from helpers.run_dirs import (
    OK,
    move_to,
    names,
    resume,
    start,
    states,
)
from helpers.tiny import (
    TINY,
    data_set,
    flags,
    pixels,
    tdkern_,
    train_args,
)
from tdkern.training import checkpoint
from tdkern.training.checkpoint import SNAPSHOT, STATE, find

pytestmark = pytest.mark.usefixtures("short_previews")


def test_checkpoints_are_ordered_by_number_past_a_billion_images(tmp_path):
    run_dir = start(tmp_path / "run")
    move_to(run_dir, 999_999_984)
    resume(run_dir, "--duration", "1000.000032")
    assert states(run_dir) == ["training-state-1000000.032"]
    assert find(run_dir, SNAPSHOT).name == "network-snapshot-1000000.032"
    assert [path.name for path in checkpoint.checkpoints(run_dir, SNAPSHOT)] == [
        "network-snapshot-999999.984",
        "network-snapshot-1000000.008",
        "network-snapshot-1000000.032",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "training-state-best",
        "training-state-000000.024.bak",
        "training-state-000000.024-copy",
        "training-state-000000.0245",
        "training-state-000000",
        "training-state-",
        "training-state-٠٠٠٠٠٠.٠٢٤",
    ],
)
def test_other_names_are_no_checkpoints_and_stay(tmp_path, name):
    run_dir = start(tmp_path / "run")
    shutil.copytree(run_dir / "training-state-000000.024", run_dir / name)
    resume(run_dir, "--duration", "40e-6")
    assert states(run_dir) == ["training-state-000000.040"]
    assert (run_dir / name / "tensors.safetensors").exists()


@pytest.mark.parametrize(
    "name",
    [
        "training-state-000000.024.tar.gz",
        "network-snapshot-000000.024.zip",
        "network-snapshot-000000.025",
    ],
)
def test_a_file_beside_is_no_checkpoint_and_stays(tmp_path, name):
    run_dir = start(tmp_path / "run")
    (run_dir / name).write_text("packed")
    resume(run_dir / "training-state-000000.024", "--duration", "40e-6")
    assert (
        states(run_dir) == ["training-state-000000.040"]
        and (run_dir / name).read_text() == "packed"
    )
    tdkern_(
        "generate",
        "--network",
        run_dir,
        "--grid",
        tmp_path / "grid.png",
        "--seeds",
        "0",
        "--steps",
        "2",
    )


def test_a_copy_of_a_state_can_be_gone_on_from(tmp_path):
    run_dir = start(tmp_path / "run")
    shutil.copytree(run_dir / "training-state-000000.024", run_dir / "training-state-best")
    resume(run_dir, "--duration", "40e-6")
    assert "image 24 of 40" in resume(run_dir / "training-state-best", "--duration", "40e-6")
    assert (run_dir / "training-state-best").exists()


@pytest.mark.parametrize("nosubdirs", [True, False])
def test_a_users_unfinished_files_stay(tmp_path, nosubdirs):
    for name in (
        ".mywork.tmp/thesis.txt",
        ".notes.tmp",
        ".reals.png.backup.tmp",
        ".training-state-best.tmp/a",
        ".tmp",
        "x.tmp",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / ".link.tmp").symlink_to(tmp_path / ".mywork.tmp")
    before = {path for path in tmp_path.rglob("*")}
    tdkern_(
        "train",
        "--data",
        OK,
        "--outdir",
        tmp_path,
        "--duration",
        8e-6,
        *flags(TINY),
        *["--nosubdirs"] * nosubdirs,
    )
    if nosubdirs:
        resume(tmp_path, "--duration", "16e-6")
    assert before <= {path for path in tmp_path.rglob("*")}


@pytest.mark.parametrize(
    "name",
    [
        "log.txt",
        "reals.png",
        "stats.jsonl",
        "fakes-000000.008.png",
        "curves-000000.008.png",
        "network-snapshot-000000.008",
    ],
)
def test_a_run_does_not_take_over_files_of_another_thing(tmp_path, name):
    (tmp_path / name).write_text("mine")
    output = tdkern_(
        *train_args(OK, tmp_path, 8e-6, TINY),
        code=1,
    )
    assert (
        f"holds {name}, which a run would write" in output
        and (tmp_path / name).read_text() == "mine"
    )


def test_keep_says_how_many_states_stay(tmp_path):
    run_dir = start(tmp_path / "run", duration=72e-6, keep=2, keep_every=3)
    kept = [f"training-state-000000.0{nimg}" for nimg in (24, 48, 64, 72)]
    assert states(run_dir) == kept
    resume(run_dir, "--duration", "96e-6", "--keep", "1")
    assert states(run_dir) == [f"training-state-000000.0{nimg}" for nimg in (24, 48, 72, 96)]


def test_what_is_later_than_where_training_goes_on_is_set_aside(tmp_path):
    run_dir = start(tmp_path / "run", duration=40e-6, keep=9)
    later = (find(run_dir, SNAPSHOT) / "tensors.safetensors").read_bytes()
    other = tmp_path / "other.zip"
    data_set(other, pixels(8, seed=5))
    output = resume(run_dir / "training-state-000000.016", "--data", other)
    assert "set aside" in output and "not the images and labels" in output
    assert (run_dir / "network-snapshot-000000.040" / "tensors.safetensors").read_bytes() != later
    assert (
        run_dir / "set-aside-network-snapshot-000000.040" / "tensors.safetensors"
    ).read_bytes() == later
    assert states(run_dir) == [f"training-state-000000.0{nimg}" for nimg in ("08", 16, 24, 32, 40)]
    assert (run_dir / "set-aside-training-state-000000.024").is_dir()
    assert "set-aside-" not in str(find(run_dir, STATE))


def test_what_was_set_aside_and_comes_again_is_not_kept_twice(tmp_path):
    run_dir = start(tmp_path / "run", duration=40e-6, keep=9)
    before = names(run_dir)
    resume(run_dir / "training-state-000000.016")
    assert names(run_dir) == before
