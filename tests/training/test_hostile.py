"""What `docs/promises.md` says of files from strangers: one line, in seconds, in little memory."""

import io
import json
import os
import shutil
import struct
import threading
import time
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch

from helpers import DATA
from helpers.operators import stand_in_for_operators
from helpers.tiny import (
    TINY,
    data_set,
    ended,
    flags,
    pixels,
    png,
    raw_data_set,
    tdkern_,
    train_args,
)
from tdkern.data import DatasetError, ImageDataset
from tdkern.data.files import one_line, write_atomic
from tdkern.evaluation.fid import read_statistics
from tdkern.training import CheckpointError, checkpoint, load_network
from tdkern.training.checkpoint import SNAPSHOT, STATE, find

pytestmark = pytest.mark.usefixtures("short_previews")
FAULTS = DATA / "faults"
OK = FAULTS / "ok.zip"
MOST = 900  # MiB
PATIENCE = 20  # seconds
DEEP = b"[" * 100_000 + b"]" * 100_000


def refused(args, tmp_path, hook=None):
    """The one line in which a command refuses, in little time and memory."""
    code, output = ended(args, tmp_path / "log", hook, PATIENCE)
    assert code in (1, 2) and "Traceback" not in output and "unforeseen" not in output, output
    assert int((tmp_path / "log.mib").read_text()) < MOST
    errors = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert (
        len(errors) == 1 and output.strip().splitlines()[-1] == errors[0] and len(errors[0]) < 2000
    )
    assert errors[0].isprintable()
    return errors[0]


def train(data, *args):
    new = ["--duration", 8e-6, *flags(TINY)]
    return [
        "train",
        "--data",
        data,
        "--outdir",
        Path(data).parent / "out",
        "--nosubdirs",
        *new,
        *args,
    ]


def generate(network, folder):
    return ["generate", "--network", network, "--outdir", folder, "--seeds", "0", "--steps", "2"]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    args = train_args(OK, run_dir, 8e-6, TINY)
    assert ended(args, run_dir.parent / "log")[0] == 0
    return run_dir


@pytest.fixture
def run_dir(a_run, tmp_path):
    """A run that a test may change."""
    copied = tmp_path / "run"
    for path in a_run.rglob("*"):
        if path.is_file():
            target = copied / path.relative_to(a_run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return copied


def seal(path, **changes):
    """Change a checkpoint's meta.json, with the checksums that it then should have."""
    meta = json.loads((path / "meta.json").read_text()) | changes
    sums = {"meta.json": checkpoint._digest(meta)}
    sums["tensors.safetensors"] = checkpoint.sha256(path / "tensors.safetensors")
    (path / "meta.json").write_text(json.dumps(meta | {"checksums": sums}))


# images


def encoded(fmt):
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(file, format=fmt)
    return file.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("kind", ["folder", "a.zip"])
def test_no_program_is_started_for_an_image(tmp_path, monkeypatch, kind):
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin64c", "xv", "display"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    path = raw_data_set(tmp_path / kind, {"a.png": POSTSCRIPT, "b.png": png(pixels(1)[0])})
    assert "a.png is not a readable image" in tdkern_(*train(path), code=1)
    assert "a.png is not a readable image" in tdkern_(
        "fid", "ref", "--data", path, "--dest", tmp_path / "x.npz", code=1
    )
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    "fmt",
    ["BMP", "TIFF", "PPM", "WEBP", "ICO", "PCX", "SGI", "TGA", "DDS", "JPEG2000", "GIF", "EPS"],
)
def test_only_png_and_jpeg_are_images(tmp_path, fmt):
    with pytest.raises(DatasetError, match=r"a.png is not a readable image"):
        ImageDataset(raw_data_set(tmp_path / "a.zip", {"a.png": encoded(fmt)}))


def png_of(side):
    """A PNG file of so many black pixels a side, in few bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    packer, rows = zlib.compressobj(9), b"\0" * (1 + 3 * side)
    data = b"".join(packer.compress(rows) for _ in range(side)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def bomb(path, name, size):
    """A zip with a file of zeros that is a thousand times larger than itself."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        file.writestr("a.png", png(pixels(1)[0]))
        with file.open(name, "w", force_zip64=True) as entry:
            for _ in range(size >> 20):
                entry.write(bytes(1 << 20))
    return path


def test_a_zip_bomb_of_an_image_is_refused(tmp_path):
    path = bomb(tmp_path / "a.zip", "b.png", 1 << 30)
    assert "b.png cannot be read (it has 1,073,741,824 bytes" in refused(train(path), tmp_path)


def test_a_zip_bomb_of_labels_is_refused(tmp_path):
    path = bomb(tmp_path / "a.zip", "dataset.json", 1 << 30)
    assert "dataset.json cannot be read (it has" in refused(train(path, "--cond", "1"), tmp_path)


@pytest.mark.parametrize("side", [5000, 13000, 60000])
@pytest.mark.parametrize("first", [True, False])
def test_a_png_of_many_pixels_is_refused_by_its_header(tmp_path, side, first):
    data = (
        png_of(side)
        if side < 20000
        else png_of(8).replace(struct.pack(">II", 8, 8), struct.pack(">II", side, side))
    )
    files = {"b.png": data} | ({} if first else {"a.png": png(pixels(1)[0])})
    refused(train(raw_data_set(tmp_path / "a.zip", files)), tmp_path)


@pytest.mark.parametrize(
    "labels, message",
    [
        (b'{"labels": [["a.png", ' + DEEP + b"]]}", "RecursionError|must be"),
        (b'{"labels": [["a.png", 100000000]]}', "classes must be below"),
        (b'{"labels": [["a.png", 1000000]]}', "classes must be below"),
        (b'{"labels": [["a.png", ' + b"9" * 5000 + b"]]}", "must be|below"),
        (b'{"labels": [["a.png", [' + b"1," * 100_000 + b"1]]]}", "at most 65536 numbers"),
    ],
    ids=["deep", "10^8", "10^6", "digits", "long"],
)
def test_labels_that_ask_for_much_are_refused(tmp_path, labels, message):
    path = raw_data_set(tmp_path / "a.zip", {"a.png": png(pixels(1)[0]), "dataset.json": labels})
    said = refused(train(path, "--cond", "1"), tmp_path)
    assert any(word in said for word in message.split("|"))


def test_a_damaged_lzma_zip_is_refused(tmp_path):
    assert "cannot be read" in refused(
        train(FAULTS / "lzma_damaged.zip", "--outdir", tmp_path / "out"), tmp_path
    )


# pipes and devices


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def zeros(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("make", [pipe, zeros])
@pytest.mark.parametrize(
    "place",
    [
        "data",
        "dataset.json",
        "state meta",
        "state tensors",
        "snapshot meta",
        "snapshot tensors",
        "convert",
        "diffusers",
        "diffusers weights",
        "ref",
        "detector",
        "options",
        "statistics",
        "converted",
    ],
)
def test_pipes_and_devices_are_refused(tmp_path, run_dir, make, place):
    folder = data_set(tmp_path / "folder", pixels(4))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "a"}')
    snapshot, state = find(run_dir, SNAPSHOT), find(run_dir, STATE)
    calc = ["fid", "calc", "--images", folder, "--num", "4"]
    if place == "options":
        checkpoint.remove(state)
    path, args = {
        "data": (tmp_path / "a.zip", train(tmp_path / "a.zip")),
        "dataset.json": (folder / "dataset.json", train(folder, "--cond", "1")),
        "state meta": (state / "meta.json", ["train", "--resume", run_dir]),
        "state tensors": (state / "tensors.safetensors", ["train", "--resume", run_dir]),
        "snapshot meta": (snapshot / "meta.json", generate(run_dir, tmp_path / "out")),
        "snapshot tensors": (snapshot / "tensors.safetensors", generate(run_dir, tmp_path / "out")),
        "convert": (
            tmp_path / "a.pkl",
            ["convert", tmp_path / "a.pkl", tmp_path / "b.safetensors"],
        ),
        "diffusers": (
            tmp_path / "unet" / "config.json",
            ["convert", tmp_path / "unet", tmp_path / "b.safetensors"],
        ),
        "diffusers weights": (
            tmp_path / "unet" / "diffusion_pytorch_model.safetensors",
            ["convert", tmp_path / "unet", tmp_path / "b.safetensors"],
        ),
        "ref": (tmp_path / "a.npz", [*calc, "--ref", tmp_path / "a.npz"]),
        "detector": (
            tmp_path / "a.pth",
            [*calc, "--ref", "no.npz", "--detector", tmp_path / "a.pth"],
        ),
        "options": (run_dir / "training_options.json", ["train", "--resume", run_dir]),
        "statistics": (run_dir / "stats.jsonl", ["train", "--resume", run_dir]),
        "converted": (
            tmp_path / "a.safetensors",
            generate(tmp_path / "a.safetensors", tmp_path / "out"),
        ),
    }[place]
    make(path)
    refused(args, tmp_path, stand_in_for_operators if place == "detector" else None)


# links in the place of our files


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".a.tmp").symlink_to(victim)
    (tmp_path / "a").symlink_to(victim)
    write_atomic(tmp_path / "a", b"new")
    assert (
        victim.read_text() == "mine"
        and (tmp_path / "a").read_bytes() == b"new"
        and not (tmp_path / "a").is_symlink()
    )


@pytest.mark.parametrize(
    "name", ["log.txt", "stats.jsonl", "run.lock", "training_options.json", "reals.png"]
)
def test_a_link_in_the_place_of_a_log_is_not_followed(tmp_path, run_dir, name):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(victim)
    code, output = ended(["train", "--resume", run_dir, "--duration", "16e-6"], tmp_path / "log")
    assert victim.read_text() == "mine" and code in (0, 1) and "Traceback" not in output
    assert code == 0 or output.strip().splitlines()[-1].startswith("Error: ")


def test_leftovers_that_are_links_are_removed_and_not_what_they_point_to(tmp_path, run_dir):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.txt").write_text("mine")
    (run_dir / ".training-state-000000.016.tmp").symlink_to(tmp_path / "victim")
    (run_dir / ".log.txt.0123abcd.tmp").symlink_to(tmp_path / "victim" / "thesis.txt")
    assert ended(["train", "--resume", run_dir, "--duration", "16e-6"], tmp_path / "log")[0] == 0
    assert (tmp_path / "victim" / "thesis.txt").read_text() == "mine"
    assert not list(run_dir.glob(".*"))


# checkpoints


@pytest.mark.parametrize(
    "part, changes",
    [
        ("model_arguments", {"model_channels": 4096}),
        ("model_arguments", {"model_channels": 10**9}),
        ("model_arguments", {"label_dim": 10**9}),
        ("model_arguments", {"augment_dim": 10**9}),
        ("model_arguments", {"img_resolution": 2**40}),
        ("model_arguments", {"in_channels": 10**9}),
        ("model_arguments", {"channel_mult": [1] * 100_000}),
        ("model_arguments", {"channel_mult": [10**9]}),
        ("model_arguments", {"num_blocks": 10**9}),
        ("model_arguments", {"num_blocks": "9" * 1_000_000}),
        ("model_arguments", {"model_channels": -1}),
        ("model_arguments", {"channel_mult": [0]}),
        ("model_arguments", {"channel_mult": []}),
        ("model_arguments", {"resample_filter": [1] * 100_000}),
        ("model_arguments", {"dropout": "a"}),
        ("model_arguments", {"dropout": float("nan")}),
        ("arguments", {"sigma_data": "x"}),
        ("arguments", {"sigma_data": None}),
        ("arguments", {"sigma_data": float("inf")}),
        ("arguments", {"sigma_data": [0.5] * 100_000}),
        (None, {"precision": ["fp32"]}),
        (None, {"class": {}}),
        (None, {"model": []}),
        (None, {"arguments": 3}),
        (None, {"img_resolution": 16}),
        (None, {"img_resolution": 8.0}),
        (None, {"class": "iDDPMPrecond", "arguments": {"M": 10**9}}),
        (
            None,
            {
                "class": "Denoiser",
                "arguments": {"schedule": {"T": 10**9, "beta_schedule": "linear"}},
            },
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_huge_network_is_refused_before_it_is_made(tmp_path, run_dir, part, changes):
    path = find(run_dir, SNAPSHOT)
    network = json.loads((path / "meta.json").read_text())["network"]
    changed = {part: network[part] | changes} if part else changes
    seal(path, network=network | changed)
    refused(generate(run_dir, tmp_path / "out"), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"cbase": 4096},
        {"cbase": 10**9},
        {"label_dim": 10**9},
        {"augment_dim": 10**9},
        {"img_resolution": 2**40},
        {"img_channels": 10**9},
        {"cres": [1] * 100_000},
        {"cres": [10**9]},
        {"cbase": -1},
        {"cres": [0]},
        {"cres": []},
        {"precond": "edm", "sigma_data": "x"},
        {"precond": "edm", "sigma_data": None},
        {"dropout": "a"},
        {"precision": ["fp32"]},
        {"precond": {}},
        {
            "precond": "ddpm",
            "diffusion_steps": 10**9,
            "noise_schedule": "linear",
            "prediction": "eps",
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("written", ["format2", "format3"])
def test_a_huge_network_of_an_older_format_is_refused_too(tmp_path, changes, written):
    path = tmp_path / "network-snapshot-000000.016"
    shutil.copytree(FAULTS.parent / written / path.name, path)
    network = json.loads((path / "meta.json").read_text())["network"]
    if written == "format2":  # without checksums
        meta = json.loads((path / "meta.json").read_text())
        (path / "meta.json").write_text(json.dumps(meta | {"network": network | changes}))
    else:
        seal(path, network=network | changes)
    refused(generate(path, tmp_path / "out"), tmp_path)


def test_a_header_of_many_tensors_is_refused(tmp_path, run_dir):
    path = find(run_dir, SNAPSHOT)
    header = json.dumps(
        {
            f"t{i:07d}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            for i in range(400_000)
        }
    ).encode()
    (path / "tensors.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    seal(path)
    assert "its header has" in refused(generate(run_dir, tmp_path / "out"), tmp_path)
    file = tmp_path / "a.safetensors"
    file.write_bytes((path / "tensors.safetensors").read_bytes())
    assert "header" in refused(generate(file, tmp_path / "out"), tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        b'{"format": 4, "kind": "network-snapshot", "x": ' + DEEP + b"}",
        b" " * (1 << 23),
        b"\xff\xfe",
        b"[" * 5_000_000,
    ],
    ids=["deep", "deep inside", "large", "no text", "open"],
)
@pytest.mark.parametrize("place", ["snapshot", "state", "options", "diffusers"])
def test_json_of_any_kind_is_refused(tmp_path, run_dir, text, place):
    if place == "options":
        checkpoint.remove(find(run_dir, STATE))
        (run_dir / "training_options.json").write_bytes(text)
        refused(["train", "--resume", run_dir], tmp_path)
    elif place == "diffusers":
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet" / "config.json").write_bytes(text)
        refused(["convert", tmp_path / "unet", tmp_path / "a.safetensors"], tmp_path)
    else:
        kind = {"snapshot": SNAPSHOT, "state": STATE}[place]
        (find(run_dir, kind) / "meta.json").write_bytes(text)
        args = (
            generate(run_dir, tmp_path / "out")
            if kind == SNAPSHOT
            else ["train", "--resume", run_dir]
        )
        refused(args, tmp_path)


# statistics for fid


def npz(path, **arrays):
    """An .npz file of raw .npy files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in arrays.items():
            file.writestr(f"{name}.npy", data)
    return path


def npy(header, data=b"", version=1):
    text = header.encode() + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


SMALL = npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }", bytes(8))


@pytest.mark.parametrize(
    "mu",
    [
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"cos\nsystem\n"),
        npy("(" * 60_000, version=2),
        npy("{" * 9_000),
        npy("__import__('os').abort()"),
        b"",
        b"\x93NUMPY\x09\x00",
        npy("{'descr': '<f8'}"),
        npy("{'descr': '<c16', 'fortran_order': False, 'shape': (1,), }", bytes(16)),
    ],
    ids=[
        "7 TiB",
        "negative",
        "objects",
        "parentheses",
        "braces",
        "code",
        "empty",
        "version",
        "half",
        "complex",
    ],
)
def test_a_reference_that_is_none_is_refused(tmp_path, mu):
    path = npz(tmp_path / "a.npz", mu=mu, sigma=SMALL)
    with pytest.raises(ValueError, match=r"a\.npz: not an \.npz file of mu and sigma"):
        read_statistics(path)


def test_a_reference_bomb_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("mu", "sigma"):
            with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                entry.write(
                    npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({1 << 26},), }}")
                )
                for _ in range(512):
                    entry.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="more than the"):
        read_statistics(path)


def test_a_reference_that_is_one_is_read(tmp_path):
    mu, sigma = np.arange(3.0), np.asfortranarray(np.arange(9.0).reshape(3, 3))
    np.savez(tmp_path / "a.npz", mu=mu, sigma=sigma)
    np.savez_compressed(tmp_path / "b.npz", mu=mu.astype(np.float32), sigma=sigma)
    for name in ("a.npz", "b.npz"):
        found = read_statistics(tmp_path / name)
        assert (
            np.array_equal(found.mu, mu)
            and np.array_equal(found.sigma, sigma)
            and found.mu.dtype == np.float64
        )


class Server(HTTPServer):
    """Answers with parts for ever, or with one every half second."""

    def __init__(self, pause):
        self.sent = 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler):
                handler.send_response(200)
                handler.end_headers()
                try:
                    while True:
                        handler.wfile.write(bytes(1 << 20) if not pause else b"x")
                        self.sent += 1
                        time.sleep(pause)
                except OSError:
                    pass

            def log_message(handler, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.mark.parametrize(
    "pause, message", [(0, "more than the"), (0.2, "slower than")], ids=["endless", "slow"]
)
def test_a_download_ends(monkeypatch, pause, message):
    import tdkern.evaluation.fid as fid

    monkeypatch.setattr(fid, "MAX_DOWNLOAD", 1 << 24)
    monkeypatch.setattr(fid, "PATIENCE", 1)
    server = Server(pause)
    try:
        with pytest.raises(ValueError, match=message):
            read_statistics(f"http://127.0.0.1:{server.server_port}/a.npz")
    finally:
        server.shutdown()
        server.server_close()


# what is printed


@pytest.mark.parametrize(
    "name", ["\x1b[31m\nx.png", "a\r\nError: b.png", "\u202egnp.png", "\x9b31m.png", "x\0.png"]
)
def test_names_do_not_reach_the_terminal_as_they_are(tmp_path, name):
    path = raw_data_set(tmp_path / "a.zip", {name: b"no image"})
    refused(train(path), tmp_path)


def test_what_a_checkpoint_says_does_not_either(tmp_path, run_dir):
    path = find(run_dir, SNAPSHOT)
    seal(path, format=99, tdkern="a\nb\x1b[31m" + "\n" * 200)
    assert "update it" in refused(generate(run_dir, tmp_path / "out"), tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_network(run_dir)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_a_converted_files_format_does_not_either(tmp_path):
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file(
        {"a": torch.zeros(1)},
        file,
        {"format": "pt", "tdkern": json.dumps({"format": "\n\x1b[31m", "network": None})},
    )
    refused(generate(file, tmp_path / "out"), tmp_path)


def test_one_line_is_one_line():
    assert one_line("a\nb\x1b[31m\u202e\udcffé") == r"a\nb\x1b[31m\u202e\udcffé"
