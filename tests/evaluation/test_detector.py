"""Detectors of `tdkern detector train`: the training, the files, and what `tdkern fid` makes of
them.
"""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from helpers import ROOT
from helpers.tiny import data_set, invoked, pixels
from tdkern.data import save_image
from tdkern.evaluation import classifier, detectors
from tdkern.evaluation.detectors import (
    RECORD,
    TrainedDetector,
    key_of,
    make_detector,
    write_detector,
)
from tdkern.evaluation.features import precision_recall_density_coverage, squared_mmd
from tdkern.evaluation.fid import (
    Statistics,
    frechet_distance,
    read_features,
    read_statistics,
    write_statistics,
)
from tdkern.evaluation.intervals import (
    frechet_floor,
    frechet_interval,
    kernel_floor,
    kernel_interval,
)
from tdkern.networks import MLP, EDMPrecond

cli = importlib.import_module("tdkern.cli.fid")


def three_kinds(count, seed):
    """Noise with more of one colour, whose number is the class."""
    images, labels = pixels(count, (3, 12, 12), seed) // 2, [i % 3 for i in range(count)]
    for image, label in zip(images, labels, strict=True):
        image[label] += 60
    return images, labels


def trained_in(folder, *flags):
    """A tiny detector's file, and what the command printed."""
    folder.mkdir()
    for name, count in {"train": 96, "test": 30}.items():
        data_set(folder / f"{name}.zip", *three_kinds(count, seed=count))
    words = ["--data", folder / "train.zip", "--test", folder / "test.zip", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "BATCH", 16)
        done = invoked(
            "detector", "train", *words, "--dest", folder / "tiny-3.safetensors", "--width", 2
        )
    return folder / "tiny-3.safetensors", done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_in(tmp_path_factory.mktemp("detector") / "a", "--epochs", 6)


# ---- training ----------------------------------------------------------------------------------


def test_it_learns_and_its_file_says_how_well(trained):
    path, printed = trained
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()[RECORD])
    assert record["accuracy"] > 0.9
    assert f"accuracy {100 * record['accuracy']:.2f} % of 30 test images" in printed
    assert f"{path.stat().st_size:,} bytes" in printed
    assert record["command"] == (
        "tdkern detector train --data train.zip --test test.zip --dest tiny-3.safetensors "
        "--epochs 6 --width 2 --seed 0"
    )
    expected = {"name": "tiny-3", "resolution": 12, "classes": 3, "width": 2, "seed": 0}
    expected |= {"train_images": 96, "test_images": 30, "format": 1}
    assert {name: record[name] for name in expected} == expected
    assert str(path.parent) not in json.dumps(record)  # nobody's folders
    measured = invoked("detector", "test", "--detector", path, "--data", path.parent / "test.zip")
    *shown, last = measured.stdout.splitlines()
    assert json.loads("\n".join(shown)) == record and last in printed


def test_the_one_that_comes_with_tdkern_is_small_and_its_page_says_what_it_is():
    path = detectors.BUILT_IN["cifar10"]
    assert path.stat().st_size < 2_000_000
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()[RECORD])
    assert (record["classes"], record["resolution"], record["test_images"]) == (10, 32, 10_000)
    page = " ".join((ROOT / "docs/evaluation.md").read_text().replace("\\\n", "").split())
    assert f"`cifar10` tells {100 * record['accuracy']:.1f} % of CIFAR-10's test images" in page
    assert record["command"] in page
    built_in = make_detector("cifar10")
    features = built_in(torch.from_numpy(pixels(4, (3, 32, 32))))
    assert features.shape == (4, built_in.dim) and built_in.identity.startswith("cifar10-")


def test_the_same_command_makes_the_same_file(trained, tmp_path):
    (path, _), folder = trained, tmp_path
    again, _ = trained_in(folder / "b", "--epochs", 6)
    other, _ = trained_in(folder / "c", "--epochs", 6, "--seed", 1)
    assert path.read_bytes() == again.read_bytes() != other.read_bytes()
    first, second, third = (TrainedDetector(each).identity for each in (path, again, other))
    assert first == second != third and first.startswith("tiny-3-")


def test_training_leaves_torchs_random_numbers_alone():
    images, labels = three_kinds(6, seed=0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    classifier.train_classifier(
        torch.from_numpy(images), torch.tensor(labels), width=1, epochs=1, seed=0
    )
    assert torch.equal(torch.rand(3), expected)


def test_augmented_images_are_mirrored_and_moved_with_reflected_edges():
    """By a pixel of 16 at most, each way: what numpy cuts from the reflected image."""
    images = pixels(200, (3, 16, 16))
    found = classifier._augmented(
        torch.from_numpy(images), torch.Generator().manual_seed(0)
    ).numpy()
    assert found.shape == images.shape
    places = []
    for image, moved in zip(images, found, strict=True):
        for mirrored, whole in enumerate((image, image[:, :, ::-1])):
            padded = np.pad(whole, ((0, 0), (1, 1), (1, 1)), "reflect")
            for top in range(3):
                for left in range(3):
                    if np.array_equal(padded[:, top : top + 16, left : left + 16], moved):
                        places.append((mirrored, top, left))
    assert len(places) == 200 and len({*places}) == 18  # each has one place, and all places occur


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (pixels(4, (3, 4, 4)), [0, 1, 0, 1], "needs images of at least 8x8 pixels and 2 classes"),
        (pixels(4, (3, 8, 8)), [0, 0, 0, 0], "got 8x8 and 1"),
        (pixels(4, (3, 8, 8)), [[1.0, 2.0]] * 4, "has vectors for labels"),
        (pixels(4, (3, 8, 8)), [0, 1, 0, 9], r"of the 10 classes .*, got \[3, 12, 12\] of 3"),
    ],
)
def test_what_nothing_is_learnt_from(tmp_path, images, labels, message):
    data = data_set(tmp_path / "a.zip", images, labels)
    test = data
    if "of the" in message:
        test = data_set(tmp_path / "b.zip", *three_kinds(6, seed=0))
    words = ["--data", data, "--test", test, "--dest", tmp_path / "new" / "a.safetensors"]
    with pytest.raises(AssertionError, match=message):
        invoked("detector", "train", *words)
    assert not (tmp_path / "new" / "a.safetensors").exists()


def test_an_error_ends_the_readers_too(tmp_path):
    """They leave signals to the process, which waited for them when it ended."""
    data = data_set(tmp_path / "a.zip", pixels(3, (3, 16, 16)))
    words = ["fid", "ref", "--data", data, "--dest", tmp_path / "a.npz", "--detector", "cifar10"]
    command = [sys.executable, "-m", "tdkern.cli", *map(str, words), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1 and "takes images of 32x32 pixels, got 16x16" in done.stderr


def test_a_name_that_no_number_could_have(tmp_path):
    for name in ("a.pt", "a b.safetensors"):
        words = ["--data", "a", "--test", "b", "--dest", tmp_path / name]
        refused = invoked("detector", "train", *words, code=2).output
        assert "--dest must end in .safetensors and be named in letters" in refused


def test_a_detector_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"mine")
    words = ["--data", "a", "--test", "b", "--dest", tmp_path / "a.safetensors"]
    assert "--dest must not be there yet" in invoked("detector", "train", *words, code=1).output
    assert (tmp_path / "a.safetensors").read_bytes() == b"mine"


# ---- files -------------------------------------------------------------------------------------


def test_features_are_the_networks_before_its_last_layer(trained):
    detector, images = make_detector(trained[0]), torch.from_numpy(pixels(5, (3, 12, 12)))
    found = detector(images)
    assert found.shape == (5, 8) == (5, detector.dim) and found.dtype == torch.float32
    assert found.min() >= 0 and not found.requires_grad
    torch.testing.assert_close(detector.net(images), detector.net.head(found))
    with pytest.raises(ValueError, match="takes images of 12x12 pixels, got 8x8; train one"):
        detector(torch.from_numpy(pixels(2)))


def test_files_that_are_no_detectors(trained, tmp_path):
    good = safetensors.torch.load_file(trained[0])
    with safe_open(trained[0], "pt") as file:
        record = json.loads(file.metadata()[RECORD])
    path = tmp_path / "a.safetensors"

    def refused(message):
        with pytest.raises(ValueError, match=rf"^{path}: {message}") as raised:
            make_detector(path)
        assert "\n" not in str(raised.value)

    def written(tensors, metadata):
        path.write_bytes(safetensors.torch.save(tensors, metadata))

    make = "; make one with tdkern detector train$"
    refused(f"not a detector .*No such file.*{make}")
    path.write_bytes(b"nothing")
    refused(f"not a detector .*{make}")
    written(good, {"tdkern": "{}"})  # a network's file
    refused(f"not a detector .*KeyError.*{make}")
    for change, message in (
        ({"format": 2}, "in format 2, and this tdkern reads format 1"),
        ({"width": 10**9}, r"its width must be in 1 \.\. 1024"),
        ({"width": True}, "its width"),
        ({"resolution": "12"}, "its resolution"),
        ({"name": "a b\n"}, "its name"),
        ({"name": 3}, "TypeError"),
    ):
        written(good, {RECORD: json.dumps(record | change)})
        refused(f"not a detector .*{message}.*{make}")
    written(good, {RECORD: "[1]"})
    refused(f"not a detector .*{make}")
    few, nan = dict(good), dict(good) | {"head.bias": good["head.bias"] * float("nan")}
    del few["head.bias"]
    written(few, {RECORD: json.dumps(record)})
    refused(r"does not match the network: head.bias must be \[3\], got nothing")
    written(good, {RECORD: json.dumps(record | {"width": 3})})
    refused("does not match the network: ")
    written(nan, {RECORD: json.dumps(record)})
    refused("holds weights that are not finite")
    written(good, {RECORD: json.dumps(record)})
    assert torch.equal(make_detector(path).net.head.bias, good["head.bias"])


def test_a_file_of_weights_is_inceptions(monkeypatch, tmp_path):
    monkeypatch.setattr(detectors, "Inception", lambda *args: args)
    for name in (None, tmp_path / "weights.pth"):
        assert make_detector(name, "cpu") == (name, "cpu")


def test_the_names_of_numbers(trained):
    inception = type("Named", (), {"name": "inception"})
    tiny = make_detector(trained[0])
    measures = ("frechet", "kernel", "kernel_std", "precision", "frechet_floor_low")
    found = [key_of(measure, inception) for measure in measures]
    assert found == ["fid", "kid", "kid_std", "precision", "fid_floor_low"]
    found = [key_of(measure, tiny) for measure in measures[:1] + measures[-1:]]
    assert found == ["frechet_tiny-3", "frechet_tiny-3_floor_low"]


def test_a_file_beside_the_package_has_a_name(trained, monkeypatch):
    monkeypatch.setattr(detectors, "BUILT_IN", {"here": trained[0]})
    assert make_detector("here").identity == make_detector(trained[0]).identity


# ---- tdkern fid --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    """A folder of images, a reference of others with their features, and the detector's file."""
    folder, (path, _) = tmp_path_factory.mktemp("fid"), trained
    (folder / "images").mkdir()
    for i, image in enumerate(torch.from_numpy(three_kinds(25, seed=7)[0])):
        save_image(folder / "images" / f"{i:06d}.png", image)
    data, ref = data_set(folder / "real.zip", three_kinds(40, seed=8)[0]), folder / "ref.npz"
    invoked(
        *("fid", "ref", "--data", data, "--dest", ref, "--features", "--detector", path),
        *("--workers", "0", "--batch", "7"),
    )
    return folder / "images", ref, path


def calculated(measured, *flags, code=0):
    images, ref, path = measured
    words = ("fid", "calc", "--images", images, "--ref", ref, "--num", "25", "--workers", "0")
    return invoked(*words, "--detector", path, *flags, code=code)


def test_calc_with_a_detector(measured):
    detector, real = make_detector(measured[2]), read_features(measured[1])
    generated = detector(torch.from_numpy(three_kinds(25, seed=7)[0]))
    reference = read_statistics(measured[1], detector)
    assert reference.detector == detector.identity
    x = generated.double().numpy()
    frechet = frechet_distance(Statistics(x.mean(0), np.cov(x.T)), reference)
    result = calculated(measured)
    assert float(result.stdout) == pytest.approx(frechet, rel=1e-4)
    assert "frechet_tiny-3 of 25 images" in result.stderr and "FID" not in result.stderr

    printed = calculated(measured, "--metrics", "prdc,kernel,frechet", "--bootstrap", "50").stdout
    *lines, last = printed.splitlines()
    found = json.loads(last)
    assert found["detector"] == detector.identity
    ends = frechet_interval(generated, reference, resamples=50)
    floor = frechet_floor(real, 25, splits=50)
    kernel_ends = kernel_interval(generated, real, resamples=50)
    expected = {
        "frechet": frechet,
        "frechet_low": ends.low,
        "frechet_high": ends.high,
        "kernel": squared_mmd(generated, real).item(),
        "kernel_low": kernel_ends.low,
        "kernel_high": kernel_ends.high,
        **precision_recall_density_coverage(generated, real)._asdict(),
        "frechet_floor": floor.mean,
        "frechet_floor_low": floor.low,
        "frechet_floor_high": floor.high,
        "kernel_floor": kernel_floor(real, 25, splits=50).mean,
    }
    for name, value in expected.items():
        assert found[key_of(name, detector)] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    numbers = [name for name in found if "tiny-3" in name]
    assert numbers == [line.split()[0] for line in lines] and len(numbers) == 16


def test_steps_with_a_detector(measured, monkeypatch):
    _, ref, path = measured
    others = torch.from_numpy(three_kinds(25, seed=7)[0])
    net = EDMPrecond(MLP())
    monkeypatch.setattr(cli, "load_network", lambda *_: (net, {"network": {"img_channels": 3}}))
    monkeypatch.setattr(cli, "sample", lambda net, network, seeds, sigmas, sampler: others[seeds])
    words = ("fid", "steps", "--network", "a", "--ref", ref, "--steps", "2,3", "--num", "25")
    printed = invoked(*words, "--detector", path, "--bootstrap", "50").stdout
    *_, last = printed.splitlines()
    found, floor = json.loads(last), frechet_floor(read_features(ref), 25, splits=50)
    assert found["frechet_tiny-3_floor"] == pytest.approx(floor.mean, rel=1e-5)
    head = ["frechet_tiny-3", "frechet_tiny-3_low", "frechet_tiny-3_high"]
    assert printed.splitlines()[0].split() == ["steps", "NFE", *head]
    for row in found["results"]:
        assert row[head[1]] < row[head[0]] < row[head[2]]
        alone = calculated(measured).stdout
        assert row[head[0]] == pytest.approx(float(alone), rel=1e-5)


def test_numbers_of_one_detector_are_not_those_of_another(measured, tmp_path, monkeypatch):
    images, ref, path = measured
    refused = calculated(measured, "--metrics", "fid", code=2).output
    assert "must be a list of frechet, kernel, prdc with the detector tiny-3, got 'fid'" in refused

    copy = tmp_path / "other.safetensors"  # as many features, of another name
    detector = make_detector(path)
    write_detector(copy, detector.net, detector.record | {"name": "other"})
    refused = calculated((images, ref, copy), code=1).output
    assert f"{ref}: must have the 8 features of other-" in refused
    assert f"got 8 of {detector.identity}; make it with tdkern fid ref and the same" in refused
    unnamed = tmp_path / "ref.npz"
    write_statistics(unnamed, Statistics(np.zeros(8), np.eye(8)))
    assert float(calculated((images, unnamed, path)).stdout) > 0  # as EDM's files are

    monkeypatch.setattr(cli, "make_detector", lambda *_: type("Named", (), {"name": "inception"}))
    refused = calculated(measured, "--bootstrap", "50", code=2).output
    assert "--bootstrap needs a small detector: give --detector a file" in refused
