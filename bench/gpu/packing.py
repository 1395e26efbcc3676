"""Packs a data set of small images so that a machine that can fetch nothing gets it along.

    PYTHONPATH=. python bench/gpu/packing.py cifar10-train-32x32.zip carried/images.zip.gz

A zip in EDM's layout, its images as JPEG (those that are stay as they are, others are encoded with
quality 95), compressed as a whole: of a JPEG file of 32x32 pixels two thirds are tables that all
have in common. CIFAR-10 takes 17 MB.
"""

import argparse
import gzip
import io
import zipfile
from pathlib import Path

import PIL.Image

from tdkern.data.files import write_atomic

MOST = 40_000_000  # bytes: 64 MiB travel, with the repository and a training state among them


def packed(source: Path) -> bytes:
    """The packed file of a zip in EDM's layout; the same for the same zip."""
    whole = io.BytesIO()
    with zipfile.ZipFile(source) as images, zipfile.ZipFile(whole, "w") as archive:
        for name in sorted(images.namelist()):
            data = images.read(name)
            if name.endswith(".png"):
                name, data = name.replace(".png", ".jpg"), as_jpeg(data)
            elif name.endswith(".json"):
                data = data.replace(b'.png"', b'.jpg"')
            archive.writestr(zipfile.ZipInfo(name), data)
    return gzip.compress(whole.getvalue(), mtime=0)


def as_jpeg(data: bytes) -> bytes:
    """A PNG file's image as a JPEG file, with colours at full resolution and common tables."""
    file = io.BytesIO()
    PIL.Image.open(io.BytesIO(data)).save(file, "jpeg", quality=95, subsampling=0)
    return file.getvalue()


def unpack(source: Path, dest: Path) -> None:
    """Write the zip that was packed."""
    write_atomic(dest, gzip.decompress(source.read_bytes()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("dest", type=Path)
    args = parser.parse_args()
    data = packed(args.source)
    if len(data) > MOST:
        raise SystemExit(
            f"{args.dest}: would have {len(data):,} bytes, more than the {MOST:,} that can be "
            "carried; give fewer or smaller images"
        )
    args.dest.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.dest, data)
    print(f"{args.dest}: {len(data):,} bytes")


if __name__ == "__main__":
    main()
