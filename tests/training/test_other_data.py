"""A run that goes on on other data says so."""

import zipfile

import numpy as np
import pytest

from helpers.run_dirs import (
    printed,
)
from helpers.tiny import (
    data_set,
    pixels,
    raw_data_set,
    tdkern_,
)
from tdkern.data import ImageDataset

pytestmark = pytest.mark.usefixtures("short_previews")


@pytest.mark.parametrize("change", ["fewer", "more", "pixels", "renamed", "labels", "none"])
def test_a_run_that_goes_on_on_other_data_says_so(tmp_path, change):
    images, labels = pixels(8), [i % 3 for i in range(8)]
    path = data_set(tmp_path / "a.zip", images, labels)
    printed(tmp_path / "run", "--cond", "1", data=path, duration=8e-6)
    path.unlink()
    if change == "pixels":
        images = images[::-1]
    if change == "labels":
        labels = labels[::-1]
    if change == "fewer":
        images, labels = images[:7], labels[:7]
    if change == "more":
        images, labels = np.concatenate([images, images[:1]]), [*labels, 0]
    data_set(path, images, labels)
    if change == "renamed":
        files = {
            name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()
        }
        raw_data_set(
            path,
            {
                name.replace("img", "pic"): data.replace(b"img", b"pic")
                for name, data in files.items()
            },
        )
    output = tdkern_("train", "--resume", tmp_path / "run", "--duration", "16e-6")
    assert ("these are not the images and labels that the run was trained on" in output) == (
        change != "none"
    )


def test_the_same_data_as_a_folder_are_the_same(tmp_path):
    images = pixels(8)
    prints = [
        ImageDataset(data_set(tmp_path / name, images)).fingerprint()
        for name in ("a.zip", "folder")
    ]
    assert (
        prints[0]
        == prints[1]
        != ImageDataset(data_set(tmp_path / "b.zip", images[::-1])).fingerprint()
    )
