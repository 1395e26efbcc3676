import io
import json
import os
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from helpers.tiny import data_set, pixels, png, raw_data_set
from tdkern.data import (
    DatasetError,
    ImageDataset,
    StepBatches,
    derive_seed,
    save_grid,
    save_image,
    step_indices,
    to_float,
    to_uint8,
)
from tdkern.data.files import write_atomic


@pytest.mark.parametrize("where", ["images.zip", "folder"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_exactly_in_the_order_of_their_names(tmp_path, where, channels):
    images = pixels(10, (channels, 8, 8))
    dataset = ImageDataset(data_set(tmp_path / where, images))
    assert len(dataset) == 10
    assert dataset.image_shape == (channels, 8, 8)
    assert dataset.label_dim == 0
    assert dataset.name == where.removesuffix(".zip")
    for i, image in enumerate(images):
        read, label = dataset[i]
        assert read.dtype == torch.uint8
        assert torch.equal(read, torch.from_numpy(image))
        assert label.shape == (0,)


def test_xflip_adds_every_mirror_image(tmp_path):
    images = pixels(5)
    dataset = ImageDataset(
        data_set(tmp_path / "a.zip", images, [0, 1, 2, 1, 0]), use_labels=True, xflip=True
    )
    assert len(dataset) == 10
    for i, image in enumerate(images):
        assert torch.equal(dataset[5 + i][0], torch.from_numpy(image).flip(2))
        assert torch.equal(dataset[5 + i][1], dataset[i][1])


def test_class_labels_are_one_hot(tmp_path):
    dataset = ImageDataset(data_set(tmp_path / "a.zip", pixels(4), [2, 0, 3, 3]), use_labels=True)
    assert dataset.label_dim == 4
    labels = torch.stack([label for _, label in dataset])
    assert labels.dtype == torch.float32
    assert torch.equal(labels, torch.eye(4)[[2, 0, 3, 3]])


def test_vector_labels_come_as_they_are(tmp_path):
    vectors = [[0.5, -1], [2, 3], [0, 0.25]]
    dataset = ImageDataset(data_set(tmp_path / "a.zip", pixels(3), vectors), use_labels=True)
    assert dataset.label_dim == 2
    assert [label.tolist() for _, label in dataset] == vectors


def test_max_size_keeps_the_same_images_for_a_seed(tmp_path):
    path = data_set(tmp_path / "a.zip", pixels(20), list(range(20)))
    kept = [ImageDataset(path, use_labels=True, max_size=5, seed=seed) for seed in (1, 1, 2)]
    assert len(kept[0]) == 5
    assert kept[0].names == kept[1].names == sorted(kept[0].names)
    assert kept[0].names != kept[2].names
    assert [label.argmax().item() for _, label in kept[0]] == [
        int(name[-6:-4]) for name in kept[0].names
    ]
    assert len(ImageDataset(path, max_size=100)) == 20


def test_worker_processes_read_what_one_process_reads(tmp_path):
    dataset = ImageDataset(
        data_set(tmp_path / "a.zip", pixels(40), list(range(40))), use_labels=True
    )
    dataset[0]  # the zip is open before the workers are forked
    order = StepBatches(40, 16, 0, 0, 6)
    read = [
        [
            (images, labels)
            for images, labels in DataLoader(dataset, batch_sampler=order, num_workers=workers)
        ]
        for workers in (0, 2)
    ]
    assert len(read[0]) == len(read[1]) == 6
    for (images, labels), (images2, labels2) in zip(*read, strict=True):
        assert torch.equal(images, images2)
        assert torch.equal(labels, labels2)


def test_a_data_set_in_use_can_be_sent_to_another_process(tmp_path):
    dataset = ImageDataset(data_set(tmp_path / "a.zip", pixels(3)))
    image = dataset[2][0]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2][0], image)


def _json(labels):
    return {
        "a.png": png(pixels(1)[0]),
        "b.png": png(pixels(1)[0]),
        "dataset.json": labels if isinstance(labels, bytes) else json.dumps(labels).encode(),
    }


@pytest.mark.parametrize(
    "labels, message",
    [
        (b'{"labels": [["a.png", 0]', r"dataset.json must be .*JSONDecodeError"),
        (b"\xff\xfe", r"dataset.json must be "),
        ({"names": []}, r"dataset.json must be .*KeyError"),
        ([1, 2], r"dataset.json must be "),
        ({"labels": [1, 2]}, r"dataset.json must be "),
        ({"labels": None}, r"dataset.json has no labels"),
        ({"labels": [["a.png", 0]]}, r"dataset.json has no label for b.png"),
        ({"labels": [["a.png", 0], ["b.png", -1]]}, r"dataset.json: labels must all be classes"),
        ({"labels": [["a.png", 0], ["b.png", [1.0]]]}, r"dataset.json: labels must all be classes"),
        (
            {"labels": [["a.png", [1.0]], ["b.png", [1.0, 2.0]]]},
            r"dataset.json: labels must all be classes",
        ),
        (
            {"labels": [["a.png", "cat"], ["b.png", "dog"]]},
            r"dataset.json: labels must all be classes",
        ),
    ],
)
def test_bad_labels_are_refused(tmp_path, labels, message):
    path = raw_data_set(tmp_path / "a.zip", _json(labels))
    with pytest.raises(DatasetError, match=f"a.zip: {message}"):
        ImageDataset(path, use_labels=True)
    assert ImageDataset(path).label_dim == 0  # only who wants labels needs them


def test_missing_labels_are_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"a.zip: dataset.json cannot be read"):
        ImageDataset(data_set(tmp_path / "a.zip", pixels(2)), use_labels=True)


def _encoded(mode, size=(8, 8), fmt="png"):
    file = io.BytesIO()
    PIL.Image.new(mode, size).save(file, format=fmt)
    return file.getvalue()


@pytest.mark.parametrize(
    "broken, message",
    [
        (b"", "b.png is not a readable image"),
        (b"no image", "b.png is not a readable image"),
        (png(pixels(1)[0])[:-40], "b.png is not a readable image"),
        (_encoded("RGB", fmt="jpeg")[:200], "b.png is not a readable image"),
        (_encoded("RGBA"), "b.png must be RGB or grey with 8 bits a channel, got Pillow mode RGBA"),
        (_encoded("P"), "b.png must be RGB or grey"),
        (_encoded("I;16"), "b.png must be RGB or grey"),
        (_encoded("RGB", (8, 4)), "b.png must be square, got 8x4"),
        (_encoded("RGB", (4, 4)), r"b.png must have a.png's shape \[3, 8, 8\], got \[3, 4, 4\]"),
        (_encoded("L"), r"b.png must have a.png's shape \[3, 8, 8\], got \[1, 8, 8\]"),
    ],
)
def test_bad_images_are_refused_by_name(tmp_path, broken, message):
    dataset = ImageDataset(
        raw_data_set(tmp_path / "a.zip", {"a.png": png(pixels(1)[0]), "b.png": broken})
    )
    assert dataset[0][0].shape == (3, 8, 8)
    with pytest.raises(DatasetError, match=f"a.zip: {message}"):
        dataset[1]


def test_bad_paths_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="nowhere: no such folder or zip"):
        ImageDataset(tmp_path / "nowhere")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(DatasetError, match=r"text.zip: not a readable zip"):
        ImageDataset(tmp_path / "text.zip")
    whole = data_set(tmp_path / "whole.zip", pixels(3)).read_bytes()
    (tmp_path / "half.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"half.zip: not a readable zip"):
        ImageDataset(tmp_path / "half.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"empty: no \.png"):
        ImageDataset(tmp_path / "empty")
    with pytest.raises(DatasetError, match="max_size must be at least 1, got 0"):
        ImageDataset(tmp_path / "whole.zip", max_size=0)


def test_a_damaged_byte_in_a_zip_is_found(tmp_path):
    path = data_set(tmp_path / "a.zip", pixels(2))
    data = bytearray(path.read_bytes())
    data[150] ^= 1  # inside the first image
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"00000/img00000000.png cannot be read \(Bad CRC"):
        ImageDataset(path)


def test_other_files_are_not_images(tmp_path):
    files = {
        "a.JPG": _encoded("RGB", fmt="jpeg"),
        "b.jpeg": _encoded("RGB", fmt="jpeg"),
        "__MACOSX/._a.JPG": b"x",
        "notes.txt": b"x",
    }
    assert ImageDataset(raw_data_set(tmp_path / "a.zip", files)).names == ["a.JPG", "b.jpeg"]


@pytest.mark.parametrize("size, batch", [(10, 4), (10, 10), (7, 20), (1, 3), (64, 1)])
def test_every_epoch_of_the_order_holds_every_image_once(size, batch):
    steps = -(-3 * size // batch)
    sequence = torch.cat([step_indices(size, batch, 5, step) for step in range(steps)])[: 3 * size]
    epochs = sequence.reshape(3, size)
    assert torch.equal(epochs.sort(1).values, torch.arange(size).expand(3, size))
    if size > 5:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


def test_the_order_depends_on_seed_and_step_alone():
    forward = [step_indices(50, 8, 1, step) for step in range(30)]
    for step in reversed(range(30)):
        assert torch.equal(step_indices(50, 8, 1, step), forward[step])
    assert not torch.equal(step_indices(50, 8, 2, 0), forward[0])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_of_the_processes_make_up_the_batch(world):
    shares = [list(StepBatches(30, 8, 3, 5, 9, rank, world)) for rank in range(world)]
    assert len(StepBatches(30, 8, 3, 5, 9)) == len(shares[0]) == 4
    for i, step in enumerate(range(5, 9)):
        assert [index for share in shares for index in share[i]] == step_indices(
            30, 8, 3, step
        ).tolist()


def test_derived_seeds_differ():
    uses = [
        (stream, *numbers)
        for stream in ("order", "init", "step")
        for numbers in ((), (0,), (0, 0), (0, 1), (1, 0), (2**33,))
    ]
    seeds = [derive_seed(seed, *use) for seed in (0, 1, 2**40) for use in uses]
    assert len(set(seeds)) == len(seeds)
    # fixed: an older run's state must go on to the same weights
    assert derive_seed(7, "step", 3, 1) == 13839595843557499967


def test_pixels_survive_the_way_to_floats_and_back():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = to_float(images)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_uint8(floats), images)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid(tmp_path, channels):
    images = torch.from_numpy(pixels(5, (channels, 4, 6)))
    save_grid(tmp_path / "grid.png", images, columns=3)
    grid = (
        np.array(PIL.Image.open(tmp_path / "grid.png")).reshape(8, 18, channels).transpose(2, 0, 1)
    )
    for i, image in enumerate(images):
        top, left = 4 * (i // 3), 6 * (i % 3)
        assert np.array_equal(grid[:, top : top + 4, left : left + 6], image)
    assert not grid[:, 4:, 12:].any()
    save_image(tmp_path / "one.png", images[0])
    assert np.array_equal(
        np.array(PIL.Image.open(tmp_path / "one.png")).reshape(4, 6, channels).transpose(2, 0, 1),
        images[0],
    )


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    write_atomic(tmp_path / "a", b"newer", durable=False)
    assert (tmp_path / "a").read_bytes() == b"newer"
    assert os.listdir(tmp_path) == ["a"]
