"""`tdkern generate` goes on after a kill, in any number of processes, to the same files."""

import importlib
import json
import os
import signal

import pytest

from helpers.tiny import (
    TINY,
    children,
    data_set,
    flags,
    in_processes,
    numbers_of_curves,
    pixels,
    started_processes,
    tdkern_,
    two_steps,
)
from tdkern.cli import main
from tdkern.data import ImageDataset
from tdkern.data.drawn import RECORD
from tdkern.data.files import beside

pytestmark = pytest.mark.usefixtures("short_previews")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step, and its seven images of seeds 0-5 and 9 as one process draws them."""
    folder = tmp_path_factory.mktemp("trained")
    data = data_set(folder / "images.zip", pixels(), [i % 3 for i in range(10)])
    args = ["--data", data, "--outdir", folder / "run", "--nosubdirs", "--cond", "--lr", "0.1"]
    with pytest.MonkeyPatch.context() as patch:  # it is not pictures that are tested
        patch.setattr("tdkern.training.record.preview_levels", two_steps)
        patch.setattr("tdkern.training.record.draw_curves", numbers_of_curves)
        tdkern_("train", *args, "--duration", 8e-6, *flags(TINY))
    return folder / "run"


def drawing(network, folder, seeds="0-5,9", *more):
    args = ("--network", network, "--outdir", folder, "--seeds", seeds)
    return ["generate", *map(str, args), "--batch", "2", "--steps", "2", *more]


@pytest.fixture(scope="module")
def straight(trained):
    tdkern_(*drawing(trained, trained / "images"))
    return files_in(trained / "images")


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def _draw(rank, args, kill):
    """One of several processes, killed at a file's turn to get its name."""
    real, calls = os.replace, iter(range(10**6))

    def replace(source, target):
        if next(calls) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = replace
    main(args, standalone_mode=False)


@pytest.mark.parametrize("first, then", [(1, 1), (1, 3), (2, 3), (3, 1), (3, 2)])
@pytest.mark.parametrize("kill", [0, 2])
def test_killed_it_goes_on_to_the_same_files(tmp_path, trained, straight, first, then, kill):
    args = drawing(trained, tmp_path / "images")
    ranks = started_processes(first, _draw, args, kill)
    for rank in ranks:
        rank.join(100)
    assert -signal.SIGKILL in [rank.exitcode for rank in ranks]
    assert len(list((tmp_path / "images").glob("0*.png"))) < 7
    in_processes(then, _draw, args, None)
    assert files_in(tmp_path / "images") == straight


def _together(rank, parts, args, ready):
    ready.wait(60)
    del os.environ["WORLD_SIZE"]  # calls that know nothing of each other
    main([*args, "--seeds", parts[rank]], standalone_mode=False)


def test_several_calls_may_fill_one_folder_at_once(tmp_path, trained, straight):
    """As in an array of jobs, each with seeds of its own."""
    args = drawing(trained, tmp_path / "images")
    in_processes(4, _together, ("0,1", "2,3", "4,5", "9"), args, children.Barrier(4))
    assert files_in(tmp_path / "images") == straight


@pytest.fixture
def drawn(tmp_path, trained, monkeypatch):
    """A call's words, which were called once; and the seeds that `sample` draws from here on."""
    seen, module = [], importlib.import_module("tdkern.cli.generate")
    args = drawing(trained, tmp_path / "images")
    tdkern_(*args)
    real = module.sample

    def sample(net, network, seeds, sigmas, **options):
        seen.append(seeds)
        return real(net, network, seeds, sigmas, **options)

    monkeypatch.setattr(module, "sample", sample)
    return args, seen


def test_only_batches_in_which_an_image_is_missing_are_drawn(tmp_path, drawn, straight):
    args, seen = drawn
    folder = tmp_path / "images"
    assert f"7 of 7 images are in {folder} already" in tdkern_(*args)
    assert seen == []
    (folder / "000002.png").unlink()
    half = (folder / "000009.png").read_bytes()[:-20]  # as after a power cut
    (folder / "000009.png").write_bytes(half)
    kept = (folder / "000003.png").stat()
    beside(folder / "000005.png").write_bytes(half)
    beside(folder / RECORD).write_text("{")
    assert f"5 of 7 images are in {folder} already" in tdkern_(*args)
    assert seen == [[2, 3], [9]]
    assert files_in(folder) == straight and len(list(folder.iterdir())) == 8
    assert (folder / "000003.png").stat().st_mtime_ns == kept.st_mtime_ns


def test_more_seeds_and_a_grid_may_come_later(tmp_path, drawn):
    args, seen = drawn
    tdkern_(*args, "--seeds", "0-7", "--grid", tmp_path / "grid.png")
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7]]  # for the grid, all of them
    assert len(list((tmp_path / "images").glob("*.png"))) == 9


@pytest.mark.parametrize(
    "changes, named",
    [
        (["--steps", "3"], ["steps 2 and not 3", "other levels"]),
        (["--class", "1"], ["class null and not 1"]),
        (["--batch", "3"], ["batch 2 and not 3"]),
        (["--sampler", "ddim"], ['sampler "heun" and not "ddim"', "S_churn 0.0 and not null"]),
        (["--S_max", "5"], ['S_max "inf" and not 5.0']),
        (["--subdirs"], ["subdirs false and not true"]),
        (["--seeds", "20-22", "--sigma_max", "70"], ["levels [80.0, "]),
    ],
)
def test_other_settings_in_one_folder_are_refused(tmp_path, drawn, changes, named):
    args, seen = drawn
    before = files_in(tmp_path / "images")
    output = tdkern_(*args, *changes, code=1).strip()
    start = f"Error: {tmp_path / 'images'}: holds images that were drawn with other settings: "
    assert output.startswith(start) and output.endswith("give another --outdir")
    assert all(difference in output for difference in named), output
    assert seen == [] and files_in(tmp_path / "images") == before


def test_other_weights_are_other_settings(tmp_path, drawn, trained):
    args, _ = drawn
    run = tmp_path / "run"
    tdkern_(
        "train",
        "--config",
        trained / "training_options.json",
        "--seed",
        1,
        "--outdir",
        run,
        "--nosubdirs",
    )
    output = tdkern_(*args, "--network", run, code=1)
    assert "drawn with other settings: other weights; give another --outdir" in output


def test_a_folder_that_does_not_say_how_it_was_drawn_is_refused(tmp_path, drawn):
    args, seen = drawn
    record = tmp_path / "images" / RECORD
    for text in ("", "[1]", "{", "\xff", "[" * 100_000):
        record.write_bytes(text.encode("latin-1"))
        output = tdkern_(*args, code=1).strip()
        assert output.startswith(f"Error: {record}: does not say how") and output.count("\n") == 0
    record.unlink()
    output = tdkern_(*args, code=1)
    assert f"{tmp_path / 'images' / '000000.png'}: is there already, and {RECORD} is not" in output
    tdkern_(*args, "--seeds", "10-11")  # beside images that are a user's own
    assert seen == [[10, 11]]


def test_the_record_is_no_stranger_to_fid_and_holds_what_json_holds(tmp_path, drawn):
    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "images" / RECORD).read_text()
    said = json.loads(text, parse_constant=refuse)
    assert said["S_max"] == "inf" and said["levels"][-1] == 0
    assert ImageDataset(tmp_path / "images").left_out == ""
