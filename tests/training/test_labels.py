"""Labels: classes without images, vectors, and what cannot be a label."""

import json

import pytest
import torch

from helpers.run_dirs import (
    FAULTS,
    line,
    printed,
    train_dry,
)
from helpers.tiny import (
    data_set,
    pixels,
    png,
    raw_data_set,
    tdkern_,
)
from tdkern.data import ImageDataset
from tdkern.training import load_network, sample

pytestmark = pytest.mark.usefixtures("short_previews")


def test_classes_without_images_are_drawn_by_nobody(tmp_path):
    path = data_set(tmp_path / "a.zip", pixels(12), [0, 5, 9] * 4)
    output = printed(tmp_path / "run", "--cond", "1", data=path, duration=8e-6)
    assert "Warning: 7 of the classes 0 to 9 have no images" in output
    net, meta = load_network(tmp_path / "run")
    assert meta["classes"] == [0, 5, 9]
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, sigma, class_labels=None):
            seen.extend(class_labels.argmax(1).tolist())
            return self.net(x, sigma, class_labels)

    sample(
        Spy(), meta["network"], list(range(64)), torch.tensor([1.0, 0.0]), classes=meta["classes"]
    )
    assert set(seen) == {0, 5, 9}
    args = [
        "generate",
        "--network",
        tmp_path / "run",
        "--outdir",
        tmp_path / "images",
        "--seeds",
        "0-1",
        "--steps",
        "2",
    ]
    assert "class 3 had no image in training; classes with images are 0, 5, 9" in line(
        tdkern_(*args, "--class", "3", code=1)
    )
    tdkern_(*args, "--class", "9")
    assert "were drawn with other settings: class 9 and not null" in line(tdkern_(*args, code=1))


def test_the_case_of_labels_from_1(tmp_path):
    printed(tmp_path / "run", "--cond", "1", data=FAULTS / "labels_1_to_3.zip", duration=8e-6)
    assert load_network(tmp_path / "run")[1]["classes"] == [1, 2, 3]


def test_where_all_classes_have_images_seeds_give_what_they_gave(tmp_path, data):
    assert (
        ImageDataset(data, use_labels=True).classes is None and ImageDataset(data).classes is None
    )


def test_vector_labels_are_not_drawn(tmp_path):
    output = printed(
        tmp_path / "run", "--cond", "1", data=FAULTS / "labels_vector.zip", duration=8e-6
    )
    # by labels of the data
    assert "not written" not in output and (tmp_path / "run" / "fakes-000000.008.png").exists()
    args = [
        "generate",
        "--network",
        tmp_path / "run",
        "--outdir",
        tmp_path / "images",
        "--steps",
        "2",
        "--seeds",
        "0",
    ]
    assert "labels are vectors and no classes" in line(tdkern_(*args, code=1))
    assert "labels are vectors and no classes" in line(tdkern_(*args, "--class", "0", code=1))


@pytest.mark.parametrize(
    "labels, message",
    [
        ([[float("nan"), 1]] * 2, "is not finite in float32"),
        ([[1e300, 1]] * 2, "is not finite in float32"),
        ([[1.0], [float("inf")]], "is not finite in float32"),
        ([[10**400]] * 2, "is not finite in float32"),
        ([10**8, 0], "classes must be below 65536"),
        ([10**30, 0], "classes must be below 65536"),
        ([2**63, 0], "classes must be below 65536"),
        ([True, 0], "labels must all be classes"),
        ([[[1.0]], [[1.0]]], "labels must all be classes"),
    ],
)
def test_labels_that_cannot_be_are_refused(tmp_path, labels, message):
    path = data_set(tmp_path / "a.zip", pixels(2), labels)
    assert message in line(train_dry(path, "--cond", "1", code=1))


@pytest.mark.parametrize(
    "name", ["labels_nan.zip", "labels_2_to_63.zip", "labels_vector_bigint.zip"]
)
def test_the_cases_of_labels(name):
    line(train_dry(FAULTS / name, "--cond", "1", code=1))


def test_labels_that_are_missing_are_missing_where_they_are_looked_for(tmp_path):
    path = raw_data_set(
        tmp_path / "a.zip", {"images/a.png": png(pixels(1)[0]), "images/dataset.json": b"{}"}
    )
    assert "there is none at the top; it must not be in images" in line(
        train_dry(path, "--cond", "1", code=1)
    )


def test_backslashes_in_a_zips_names(tmp_path):
    """As some programs of Windows write them; dataset.json has EDM's slashes."""
    files = {f"00000\\img{i}.png": png(image) for i, image in enumerate(pixels(3))}
    table = {"labels": [[f"00000/img{i}.png", 2 - i] for i in range(3)]}
    path = raw_data_set(tmp_path / "a.zip", {**files, "dataset.json": json.dumps(table).encode()})
    dataset = ImageDataset(path, use_labels=True)
    assert [int(label.argmax()) for _, label in dataset] == [2, 1, 0]
