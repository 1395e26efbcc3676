"""Which images a run takes, and what it says of the others."""

import io
import os
import zipfile

import numpy as np
import PIL.Image
import pytest

from helpers.run_dirs import (
    FAULTS,
    line,
    train_dry,
)
from helpers.tiny import (
    data_set,
    pixels,
    png,
    raw_data_set,
    tdkern_,
)
from tdkern.data import DatasetError, ImageDataset

pytestmark = pytest.mark.usefixtures("short_previews")


def test_hidden_files_are_no_part_of_the_data(tmp_path):
    output = train_dry(FAULTS / "hidden_folder.zip")
    assert "8 images" in output and "2 hidden" in output
    names = [
        "a.png",
        ".b.png",
        ".git/c.png",
        "x/.ipynb_checkpoints/d.png",
        "@eaDir/e.png",
        "__MACOSX/f.png",
        "x/g.png",
        "lost+found/h.png",
    ]
    for path in (tmp_path / "a.zip", tmp_path / ".hidden" / "folder"):
        path.parent.mkdir(exist_ok=True)
        assert ImageDataset(
            raw_data_set(path, {name: png(pixels(1)[0]) for name in names})
        ).names == ["a.png", "x/g.png"]


def test_other_endings_are_counted_and_named(tmp_path):
    output = train_dry(FAULTS / "other_formats.zip")
    assert (
        "8 images" in output
        and "Left out of" in output
        and "1 .bmp, 1 .jfif, 1 .tif, 1 .webp" in output
    )
    with pytest.raises(DatasetError, match=r"no \.png.* beside 2 \.webp"):
        ImageDataset(raw_data_set(tmp_path / "a.zip", {"a.webp": b"", "b.webp": b""}))


def test_linked_folders_are_followed_once(tmp_path):
    real = data_set(tmp_path / "real", pixels(8))
    for name in ("set", "loop", "twice"):
        (tmp_path / name).mkdir()
    (tmp_path / "set" / "y").symlink_to(real)
    (tmp_path / "set" / "link.png").symlink_to(real / "00000" / "img00000000.png")
    assert len(ImageDataset(tmp_path / "set")) == 9
    (tmp_path / "loop" / "x.png").write_bytes(png(pixels(1)[0]))
    (tmp_path / "loop" / "again").symlink_to(tmp_path / "loop")
    (tmp_path / "loop" / "up").symlink_to("..")
    assert len([name for name in ImageDataset(tmp_path / "loop").names if name.count("x.png")]) == 1
    (tmp_path / "twice" / "a").symlink_to(real)
    (tmp_path / "twice" / "b").symlink_to(real)
    assert len(ImageDataset(tmp_path / "twice")) == 8
    whole = tmp_path / "whole"
    whole.symlink_to(real)
    assert len(ImageDataset(whole)) == 8


def test_what_cannot_be_read_is_an_error(tmp_path):
    folder = data_set(tmp_path / "a", pixels(8))
    (folder / "dead.png").symlink_to(folder / "gone.png")
    with pytest.raises(DatasetError, match=r"dead.png cannot be read"):
        ImageDataset(folder)
    (folder / "dead.png").unlink()
    (folder / "dead").symlink_to(folder / "gone")  # no image: nothing is missed
    assert len(ImageDataset(folder)) == 8
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(DatasetError, match=r"pipe.png is not a regular file"):
        ImageDataset(folder)


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    folder = data_set(tmp_path / "a", pixels(8))
    real = os.scandir

    def scandir(path):
        if str(path).endswith("00001"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # a test as root is refused nothing
    with pytest.raises(DatasetError, match=r"the folder 00001 cannot be read .*Permission denied"):
        ImageDataset(folder)


def test_one_name_twice_is_an_error(tmp_path):
    path = data_set(tmp_path / "a.zip", pixels(2))
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("00000/img00000000.png", png(pixels(1)[0]))
    with pytest.raises(DatasetError, match=r"holds 00000/img00000000.png twice"):
        ImageDataset(path)


def _encoded(image, fmt="png", **options):
    file = io.BytesIO()
    image.save(file, format=fmt, **options)
    return file.getvalue()


def _turned(fmt):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return _encoded(PIL.Image.new("RGB", (8, 8)), fmt, exif=exif)


def _frames():
    frames = [PIL.Image.fromarray(image.transpose(1, 2, 0)) for image in pixels(3)]
    return _encoded(frames[0], "png", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    "image, message",
    [
        (_turned("jpeg"), "EXIF orientation 6"),
        (_turned("png"), "EXIF orientation 6"),
        (_frames(), "got 3 frames"),
        (_encoded(PIL.Image.new("RGB", (8, 8)), transparency=(0, 0, 0)), "transparent colour"),
        (_encoded(PIL.Image.new("L", (8, 8)), transparency=0), "transparent colour"),
        (_encoded(PIL.Image.fromarray(np.zeros((8, 8), np.uint16))), "8 bits"),
        (_encoded(PIL.Image.new("1", (8, 8))), "Pillow mode 1"),
        (_encoded(PIL.Image.new("CMYK", (8, 8)), "jpeg"), "Pillow mode CMYK"),
    ],
    ids=[
        "jpeg turned",
        "png turned",
        "frames",
        "transparent",
        "transparent grey",
        "16 bits",
        "1 bit",
        "CMYK",
    ],
)
def test_pixels_that_are_not_all_the_file_says_are_refused(tmp_path, image, message):
    name = "b.jpg" if image[:2] == b"\xff\xd8" else "b.png"
    for path in ("a.zip", "folder"):
        dataset = ImageDataset(
            raw_data_set(tmp_path / path, {"a.png": png(pixels(1)[0]), name: image})
        )
        with pytest.raises(DatasetError, match=message):
            dataset[1]


@pytest.mark.parametrize("name", ["rgb16.zip", "rgb16_of_12bit.zip"])
def test_16_bits_are_refused(name):
    assert "must have 8 bits a channel, got 16" in line(train_dry(FAULTS / name, code=1))
    assert "must have 8 bits a channel, got 16" in line(
        tdkern_("fid", "ref", "--data", FAULTS / name, "--dest", "nowhere.npz", code=1)
    )


def test_upright_and_single_images_are_taken(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 1
    images = {
        "a.png": png(pixels(1)[0]),
        "b.jpg": _encoded(PIL.Image.new("RGB", (8, 8)), "jpeg", exif=exif),
        "c.jpg": _encoded(PIL.Image.new("RGB", (8, 8)), "jpeg", exif=b"Exif\0\0broken"),
    }
    assert len([image for image, _ in ImageDataset(raw_data_set(tmp_path / "a.zip", images))]) == 3
