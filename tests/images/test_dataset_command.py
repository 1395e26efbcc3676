"""`tdkern dataset`: from what others keep to EDM's zip or a packed array."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import PIL.Image
import pytest

from helpers.tiny import TINY, data_set, flags, pixels, png, raw_data_set, tdkern_
from tdkern.data import DatasetError, ImageDataset
from tdkern.data.collect import open_collection
from tdkern.data.pack import Settings, pack
from tdkern.data.resize import LeftOut, resized


def made(source, dest, *args, code=0):
    return tdkern_("dataset", source, dest, *args, code=code)


def images_of(path, **options):
    dataset = ImageDataset(path, **options)
    return np.stack([image.numpy() for image, _ in dataset])


def encoded(image, fmt="png", **options):
    file = io.BytesIO()
    image.save(file, format=fmt, **options)
    return file.getvalue()


@pytest.mark.parametrize("source", ["a.zip", "folder"])
@pytest.mark.parametrize("dest", ["out.zip", "out.npy"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_and_labels_come_through(tmp_path, source, dest, channels):
    images = pixels(10, (channels, 8, 8))
    data_set(tmp_path / source, images, [i % 3 for i in range(10)])
    grey = ["--grey"] if channels == 1 else []
    output = made(tmp_path / source, tmp_path / dest, *grey)
    assert f"10 images [{channels}, 8, 8]; 0 left out" in output
    dataset = ImageDataset(tmp_path / dest, use_labels=True)
    assert np.array_equal(images_of(tmp_path / dest), images)
    assert [int(label.argmax()) for _, label in dataset] == [i % 3 for i in range(10)]
    assert sorted(os.listdir(tmp_path)) == sorted(
        {source, dest, *(["out.json"] if dest == "out.npy" else [])}
    )


def test_a_packed_array_trains_to_the_same_bits_as_its_zip(tmp_path, short_previews):
    data_set(tmp_path / "a.zip", pixels(10), [i % 3 for i in range(10)])
    made(tmp_path / "a.zip", tmp_path / "b.npy")
    for name in ("a.zip", "b.npy"):
        args = [
            "--data",
            tmp_path / name,
            "--outdir",
            tmp_path / name[0],
            "--nosubdirs",
            "--cond",
            "1",
        ]
        tdkern_("train", *args, "--duration", 16e-6, *flags(TINY | {"workers": 2}))
    parts = [
        (tmp_path / name / "training-state-000000.016" / "tensors.safetensors").read_bytes()
        for name in "ab"
    ]
    assert parts[0] == parts[1]


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 3, 8, 8)), "uint8"),
        (np.zeros((2, 3, 8), np.uint8), "uint8"),
        (np.zeros((2, 8, 8, 3), np.uint8), "uint8"),
        (np.zeros((2, 3, 8, 4), np.uint8), "uint8"),
        (b"no array", "not a readable"),
        (
            b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, "
            b"'shape': (1000000, 3, 64, 64), }" + b" " * 44 + b"\n",
            "not a readable",
        ),
        (np.array([None]), "not a readable"),
    ],
)
def test_a_packed_array_that_is_none_is_refused(tmp_path, array, message):
    if isinstance(array, bytes):
        (tmp_path / "a.npy").write_bytes(array)
    else:
        np.save(tmp_path / "a.npy", array)
    with pytest.raises(DatasetError, match=rf"a\.npy: .*{message}"):
        ImageDataset(tmp_path / "a.npy")


# resizing


def test_crops_and_sizes():
    wide = np.zeros((6, 10, 3), np.uint8)
    wide[:, 2:8] = 200
    assert (resized(wide, None, "crop", False) == 200).all()
    assert (
        resized(wide, 4, "crop", False).shape == (3, 4, 4)
        and (resized(wide, 4, "crop", False) == 200).all()
    )
    assert resized(wide, 12, "stretch", False)[:, :, 0].max() < 50
    with pytest.raises(LeftOut, match="not square"):
        resized(wide, 4, "none", False)
    assert resized(wide, None, "crop", True).shape == (1, 6, 6)


def test_shrinking_averages_as_clean_fid_asks():
    """A checkerboard becomes grey: a filter of fixed support would give black or white."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    small = resized(np.stack([board] * 3, 2).astype(np.uint8), 8, "crop", False)
    assert abs(small.astype(int) - 127.5).max() <= 4
    image = PIL.Image.fromarray(pixels(1, (3, 32, 32))[0].transpose(1, 2, 0))
    expected = np.array(image.resize((12, 12), PIL.Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.array_equal(resized(encoded(image), 12, "stretch", False), expected)


def _turned(pixels_, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(PIL.Image.fromarray(pixels_), exif=exif)


def test_images_are_turned_as_exif_says():
    upright = pixels(1, (3, 8, 8))[0]
    turned = np.rot90(upright.transpose(1, 2, 0))  # orientation 6 turns it back, clockwise
    assert np.array_equal(
        resized(_turned(np.ascontiguousarray(turned), 6), None, "crop", False), upright
    )


def test_what_is_left_out_is_reported_with_its_reason(tmp_path):
    rgb = PIL.Image.new("RGB", (8, 8))
    frames = [PIL.Image.fromarray(image.transpose(1, 2, 0)) for image in pixels(2)]
    clear = PIL.Image.new("RGBA", (8, 8), (1, 2, 3, 0))
    files = {
        "00.png": encoded(rgb),
        "01.webp": encoded(rgb, "webp"),
        "02.bmp": encoded(rgb, "bmp"),
        "03.jpg": encoded(rgb, "jpeg"),
        "04.gif": encoded(PIL.Image.new("P", (8, 8)), "gif"),
        "05.tif": encoded(rgb, "tiff"),
        "06.png": encoded(rgb.convert("RGBA")),
        "07.png": encoded(rgb.convert("1")),
        "10.png": b"no image",
        "11.png": encoded(rgb)[:45],
        "12.png": encoded(clear),
        "13.png": encoded(frames[0], save_all=True, append_images=frames[1:]),
        "14.jpg": encoded(PIL.Image.new("CMYK", (8, 8)), "jpeg"),
        "15.png": encoded(PIL.Image.fromarray(np.zeros((8, 8), np.uint16))),
        "16.png": encoded(PIL.Image.new("RGB", (9, 9))),
        "17.png": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "notes.txt": b"",
        ".hidden.png": b"",
    }
    output = made(raw_data_set(tmp_path / "a", files), tmp_path / "b.zip", "--workers", "1")
    assert (
        "8 images [3, 8, 8]; 8 left out" in output
        and "not images: 1 .txt, 1 hidden" in output
        and "no labels" in output
    )
    for text in (
        "1 transparent: 12.png",
        "1 several frames: 13.png",
        "1 Pillow mode CMYK: 14.jpg",
        "1 of the size 9x9: 16.png",
        "15.png",
    ):
        assert text in output
    assert len(ImageDataset(tmp_path / "b.zip")) == 8
    assert "no image is left" in made(
        raw_data_set(tmp_path / "c", {"a.png": b""}), tmp_path / "d.zip", code=1
    )


def _tiff_of_16_bits(side):
    """An RGB TIFF file of 12-bit data in 16 bits, which Pillow does not write."""
    data = np.full((side, side, 3), 4000, "<u2").tobytes()
    tags = {256: side, 257: side, 258: 16, 259: 1, 262: 2, 273: 0, 277: 3, 278: side}
    tags |= {279: len(data), 284: 1}
    end = 8 + 2 + 12 * len(tags) + 4
    file = struct.pack("<4sIH", b"II*\0", 8, len(tags))
    for tag, value in tags.items():
        kind, count = (3, 3) if tag == 258 else (4, 1)
        place = {258: end, 273: end + 6}.get(tag, value)
        file += struct.pack("<HHII", tag, kind, count, place)
    return file + struct.pack("<I3H", 0, 16, 16, 16) + data


def test_16_bits_in_a_tiff_file_are_left_out(tmp_path):
    """Pillow opens it as RGB and drops the low bytes: 4000 of 4095 would be 15 of 255."""
    files = {"a.tif": _tiff_of_16_bits(8), "b.tif": encoded(PIL.Image.new("RGB", (8, 8)), "tiff")}
    assert np.array(PIL.Image.open(io.BytesIO(files["a.tif"]))).max() == 15
    output = made(raw_data_set(tmp_path / "a", files), tmp_path / "b.zip")
    assert "1 images [3, 8, 8]; 1 left out" in output and "1 16 bits a channel: a.tif" in output


def test_the_most_common_size_is_kept_wherever_another_comes_first(tmp_path, monkeypatch):
    import tdkern.data.pack as module

    monkeypatch.setattr(module, "CHUNK", 4)
    files = {f"{i:02d}.png": png(image) for i, image in enumerate(pixels(9))}
    odd = encoded(PIL.Image.new("RGB", (9, 9)))
    source = raw_data_set(tmp_path / "a", {**files, "0.png": odd, "03z.png": odd})
    output = made(source, tmp_path / "b.zip")
    assert "9 images [3, 8, 8]; 2 left out" in output
    assert "2 of the size 9x9: 0.png, 03z.png" in output
    assert np.array_equal(images_of(tmp_path / "b.zip"), pixels(9))


# where from


def _cifar(folder, protocol=2):
    """CIFAR-10's files as Python 2 pickled them: text and arrays' bytes are byte strings."""
    images, labels = pixels(12, (3, 32, 32)), [i % 10 for i in range(12)]
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{j}" for j in range(1, 6)), "test_batch"]):
        part = slice(2 * i, 2 * i + 2)
        (folder / name).write_bytes(
            _as_python_2(
                {
                    "data": images[part].reshape(2, -1),
                    "labels": labels[part],
                    "filenames": ["a", "b"],
                }
            )
        )
    return images, labels


def _as_python_2(value):
    out = [b"\x80\x02}"]

    def text(word):
        data = word if isinstance(word, bytes) else word.encode()
        out.append(
            b"U" + bytes([len(data)]) + data
            if len(data) < 256
            else b"T" + len(data).to_bytes(4, "little") + data
        )

    out.append(b"(")
    for key, entry in value.items():
        text(key)
        if isinstance(entry, np.ndarray):
            out.append(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85")
            text("b")
            out.append(
                b"\x87R(K\x01"
                + b"".join(b"M" + n.to_bytes(2, "little") for n in entry.shape)
                + b"\x86cnumpy\ndtype\n"
            )
            text("u1")
            out.append(b"K\x00K\x01\x87R(K\x03")
            text("|")
            out.append(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
            text(entry.tobytes())
            out.append(b"tb")
        else:
            out.append(b"](")
            for one in entry:
                text(one) if isinstance(one, str) else out.append(b"K" + bytes([one]))
            out.append(b"e")
    return b"".join([*out, b"u."])


def test_folders_of_cifars_names_are_none_of_its_files(tmp_path):
    files = {"train/a.png": png(pixels(1)[0]), "test/b.png": png(pixels(2)[1]), "meta/c.txt": b""}
    made(raw_data_set(tmp_path / "a", files), tmp_path / "b.zip")
    assert len(ImageDataset(tmp_path / "b.zip")) == 2


@pytest.mark.parametrize("packed", [False, True])
def test_cifars_pickles_are_read_without_running_them(tmp_path, packed):
    folder = tmp_path / "cifar-10-batches-py"
    images, labels = _cifar(folder)
    assert np.array_equal(
        pickle.loads((folder / "data_batch_1").read_bytes(), encoding="latin1")["data"],
        images[:2].reshape(2, -1),
    )
    source = folder
    if packed:
        source = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(source, "w:gz") as archive:
            archive.add(folder, folder.name)
    for split, part in (("train", slice(10)), ("test", slice(10, 12))):
        made(source, tmp_path / f"{split}.zip", "--split", split)
        assert np.array_equal(images_of(tmp_path / f"{split}.zip"), images[part])
        dataset = ImageDataset(tmp_path / f"{split}.zip", use_labels=True)
        assert [int(label.argmax()) for _, label in dataset] == labels[part]


def test_a_hostile_pickle_among_cifars_is_refused(tmp_path):
    folder = tmp_path / "cifar"
    _cifar(folder)
    (folder / "data_batch_3").write_bytes(
        b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    )
    output = made(folder, tmp_path / "a.zip", code=1)
    assert "data_batch_3: refused" in output and not (tmp_path / "ran").exists()


def test_cifars_files_with_other_numbers_than_bytes_are_refused(tmp_path):
    folder = tmp_path / "cifar"
    _cifar(folder)
    part = {"data": np.zeros((2, 3 * 32 * 32), np.float32), "labels": [0, 1]}
    (folder / "data_batch_3").write_bytes(pickle.dumps(part, 2))
    output = made(folder, tmp_path / "a.zip", code=1)
    assert "data_batch_3: is none of CIFAR's files (its data are float32, not bytes)" in output


@pytest.mark.parametrize("label", [".cls", ".json", None])
def test_webdataset_tars(tmp_path, label):
    images = pixels(5)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in (3, 0, 4, 1, 2):
            parts = {".png": png(images[i]), ".txt": b"a caption"}
            if label:
                parts[label] = (
                    str(i).encode() if label == ".cls" else json.dumps({"label": i}).encode()
                )
            for ending, data in parts.items():
                entry = tarfile.TarInfo(f"shard/{i:05d}{ending}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    output = made(tmp_path / "a.tar", tmp_path / "b.zip")
    assert (
        np.array_equal(images_of(tmp_path / "b.zip"), images)
        and "not images: 5 of other endings" in output
    )
    if label:
        assert [int(y.argmax()) for _, y in ImageDataset(tmp_path / "b.zip", use_labels=True)] == [
            0,
            1,
            2,
            3,
            4,
        ]
    else:
        assert "no labels" in output


def test_labels_by_folders(tmp_path):
    files = {
        f"{kind}/{i}.png": png(image)
        for kind in ("dog", "cat", "eel")
        for i, image in enumerate(pixels(2))
    }
    source = raw_data_set(tmp_path / "a", files)
    made(source, tmp_path / "b.zip", "--labels", "folders")
    assert [int(y.argmax()) for _, y in ImageDataset(tmp_path / "b.zip", use_labels=True)] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    (source / "top.png").write_bytes(png(pixels(1)[0]))
    assert "some are at the top" in made(source, tmp_path / "c.zip", "--labels", "folders", code=1)
    whole = raw_data_set(tmp_path / "d.zip", {f"pets/{name}": data for name, data in files.items()})
    output = made(whole, tmp_path / "e.zip", "--labels", "folders", code=1)  # all would be class 0
    assert "labels by folders need two at the top; all images are in pets" in output


def test_lmdb(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    images = pixels(4)
    with (
        lmdb.open(str(tmp_path / "a"), map_size=1 << 20) as database,
        database.begin(write=True) as transaction,
    ):
        for i, image in enumerate(images):
            transaction.put(f"{i:04d}".encode(), png(image))
    made(tmp_path / "a", tmp_path / "b.zip")
    assert np.array_equal(images_of(tmp_path / "b.zip"), images)


def test_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = pixels(4)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {
        "image": [{"bytes": png(image), "path": None} for image in images],
        "label": [1, 0, 0, 1],
    }
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "a")
    made(tmp_path / "a", tmp_path / "b.zip")
    assert np.array_equal(images_of(tmp_path / "b.zip"), images)
    assert [int(y.argmax()) for _, y in ImageDataset(tmp_path / "b.zip", use_labels=True)] == [
        1,
        0,
        0,
        1,
    ]


@pytest.mark.parametrize("names, package", [(["data.mdb"], "lmdb"), (["state.json"], "datasets")])
def test_without_an_extra_one_line_says_what_to_install(tmp_path, monkeypatch, names, package):
    monkeypatch.setitem(sys.modules, package, None)
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert f"run: pip install {package}" in made(tmp_path, tmp_path / "b.zip", code=1)


# to be gone on with


def test_a_call_that_was_killed_is_gone_on_with(tmp_path, monkeypatch):
    import tdkern.data.pack as module

    monkeypatch.setattr(module, "CHUNK", 4)
    images = pixels(18)
    data_set(tmp_path / "a.zip", images)
    collection, reads = open_collection(tmp_path / "a.zip"), []

    def stopping(parts, total):
        for i, part in enumerate(parts):
            reads.append(total)
            if i == 2:
                raise KeyboardInterrupt
            yield part

    settings = Settings(None, "crop", False)
    with pytest.raises(KeyboardInterrupt):
        pack(collection, tmp_path / "b.zip", settings, progress=stopping)
    done = len(list((tmp_path / "b.zip.partial").glob("part-*.npz")))
    assert 3 <= done <= 5 and not (tmp_path / "b.zip").exists()
    with pytest.raises(DatasetError, match="holds parts of other work"):
        pack(collection, tmp_path / "b.zip", Settings(4, "crop", False))
    totals = []
    pack(
        collection,
        tmp_path / "b.zip",
        settings,
        progress=lambda parts, total: totals.append(total) or parts,
    )
    assert totals == [5 - done]
    assert np.array_equal(images_of(tmp_path / "b.zip"), images) and sorted(
        os.listdir(tmp_path)
    ) == ["a.zip", "b.zip"]


@pytest.mark.parametrize("changed", ["content", "size"])
def test_what_is_done_is_not_taken_for_that_of_other_images_of_the_same_names(tmp_path, changed):
    """As CIFAR-10's and CIFAR-100's are, or a folder in which a broken image was replaced."""
    images = pixels(300)
    raw_data_set(tmp_path / "a", {f"{i:03d}.png": png(image) for i, image in enumerate(images)})

    def stopping(parts, total):
        yield from parts
        raise KeyboardInterrupt

    args = tmp_path / "b.npy", Settings(None, "crop", False)
    with pytest.raises(KeyboardInterrupt):
        pack(open_collection(tmp_path / "a"), *args, progress=stopping)
    if changed == "size":  # of a file whose content is not looked at
        (tmp_path / "a" / "001.png").write_bytes(png(images[1]) + b"\0")
    else:
        flipped = {f"{i:03d}.png": png(255 - image) for i, image in enumerate(images)}
        raw_data_set(tmp_path / "a", flipped)
    with pytest.raises(DatasetError, match="holds parts of other work"):
        pack(open_collection(tmp_path / "a"), *args)


def test_labels_that_are_not_its_own_are_not_written_over(tmp_path):
    data_set(tmp_path / "a", pixels(3), [2, 0, 1])
    before = (tmp_path / "a" / "dataset.json").read_bytes()
    output = made(tmp_path / "a", tmp_path / "a" / "dataset.npy", code=1)
    assert "dataset.json: is there already" in output
    assert (tmp_path / "a" / "dataset.json").read_bytes() == before
    assert not (tmp_path / "a" / "dataset.npy.partial").exists()


def test_a_call_that_was_killed_behind_its_labels_is_gone_on_with(tmp_path, monkeypatch):
    data_set(tmp_path / "a.zip", pixels(3), [2, 0, 1])
    args = open_collection(tmp_path / "a.zip"), tmp_path / "b.npy", Settings(None, "crop", False)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tdkern.data.pack.os.rename", killed)
        pack(*args)
    assert (tmp_path / "b.json").exists() and not (tmp_path / "b.npy").exists()
    pack(*args)
    assert np.array_equal(images_of(tmp_path / "b.npy"), pixels(3))


def test_any_number_of_workers_makes_the_same_file(tmp_path):
    data_set(tmp_path / "a.zip", pixels(30))
    for workers in (1, 3):
        made(tmp_path / "a.zip", tmp_path / f"{workers}.npy", "--workers", workers, "--size", 5)
    assert (tmp_path / "1.npy").read_bytes() == (tmp_path / "3.npy").read_bytes()


@pytest.mark.parametrize(
    "args, message",
    [
        (["nowhere", "b.zip"], "nowhere: no such folder or zip"),
        (["a.zip", "b.tar"], "must end in .zip or .npy"),
        (["a.zip", "a.zip"], "is there already"),
        (["a.zip", "no/such/b.zip"], None),
        (["empty", "b.zip"], "no images in it"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    data_set(tmp_path / "a.zip", pixels(2))
    (tmp_path / "empty").mkdir()
    if message is None:  # the folder is made
        made(*args)
        assert (tmp_path / args[1]).exists()
    else:
        assert message in made(*args, code=1).strip().splitlines()[-1]


def test_dataset_works_from_a_shell(tmp_path):
    data_set(tmp_path / "a.zip", pixels(3))
    command = [
        sys.executable,
        "-m",
        "tdkern.cli",
        "dataset",
        str(tmp_path / "a.zip"),
        str(tmp_path / "b.zip"),
        "--size",
        "4",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "3 images [3, 4, 4]; 0 left out" in result.stdout
    assert zipfile.ZipFile(tmp_path / "b.zip").testzip() is None
