"""A folder of images that `tdkern generate` draws: a PNG file for each seed, all drawn alike."""

import json
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from .files import (
    FileError,
    brief,
    check_file,
    first_of,
    read_file,
    remove_leftovers,
    write_atomic,
)
from .images import save_image

RECORD = "generate.json"  # how the folder's images are drawn
FORMAT = 1
MAX_RECORD = 1 << 24  # bytes: a list of all classes of a large data set takes some
PNG_BEGIN, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
LONGEST = 40  # characters of a setting in a message


class DrawnFolder:
    """The images of a network in a folder, and beside them a record of how they are drawn.

    The record is there before the first image. Images that are whole need not be drawn again;
    images of other settings are refused. Any number of processes may write into one folder at once.

    Args:
        folder: which need not be there yet.
        settings: all that an image depends on beside its seed, as JSON holds it.
        subdirs: whether every 1000 seeds have a folder of their own.
    """

    def __init__(self, folder: str | Path, settings: dict, *, subdirs: bool = False):
        self.folder, self.subdirs = Path(folder), subdirs
        settings = {"format": FORMAT, **settings, "subdirs": subdirs}
        self.text = json.dumps(settings, indent=2)
        self.settings = json.loads(self.text)
        self.record = self.folder / RECORD
        self.recorded = False

    def path(self, seed: int) -> Path:
        """Where a seed's image is."""
        folder = self.folder / f"{seed - seed % 1000:06d}" if self.subdirs else self.folder
        return folder / f"{seed:06d}.png"

    def check(self, seeds: list[int]) -> None:
        """See that the images of these seeds can be drawn here.

        Raises:
            FileError: the folder's images are drawn with other settings, or one of these is there
                and the folder does not say how it was drawn.
        """
        # looked for before the record is: another process writes the record first
        there = next((path for path in map(self.path, seeds) if path.exists()), None)
        if self.record.exists():
            self._compare()
        elif there:
            raise FileError(
                f"{there}: is there already, and {RECORD} is not, which would say how it was "
                "drawn; give another --outdir, or remove it"
            )

    def _compare(self) -> None:
        """Raises FileError where the record says other settings."""
        try:
            theirs = json.loads(read_file(self.record, MAX_RECORD))
            names = [name for name in {**theirs, **self.settings}]
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise FileError(
                f"{self.record}: does not say how the images beside it were drawn "
                f"({brief(error)}); give another --outdir, or remove both"
            ) from error
        ours = self.settings
        differing = [
            _difference(name, theirs.get(name), ours.get(name))
            for name in names
            if theirs.get(name) != ours.get(name)
        ]
        if differing:
            raise FileError(
                f"{self.folder}: holds images that were drawn with other settings: "
                f"{first_of(differing)}; give another --outdir"
            )
        remove_leftovers(self.folder, RECORD.__eq__)

    def is_there(self, seed: int) -> bool:
        """Whether a seed's image is there, and whole: a power cut may leave half of one."""
        try:
            check_file(self.path(seed))
            with open(self.path(seed), "rb") as file:
                begin = file.read(len(PNG_BEGIN))
                file.seek(-len(PNG_END), 2)
                return begin == PNG_BEGIN and file.read() == PNG_END
        except OSError:
            return False

    def save(self, seed: int, image: Tensor) -> None:
        """Write an image, [1 or 3, H, W] uint8, whole or not at all."""
        if not self.recorded:
            self._write_record()
        save_image(self.path(seed), image, durable=False)

    def _write_record(self) -> None:
        """Write the record, if no other process has: all write the same, or are refused."""
        if not self.record.exists():
            # another process that has written it takes what is unfinished here for a leftover
            with suppress(FileNotFoundError):
                write_atomic(self.record, self.text.encode(), durable=False)
        self._compare()
        self.recorded = True


def _difference(name: str, theirs, ours) -> str:
    """In words, how two settings of a name differ."""
    texts = [json.dumps(each) for each in (theirs, ours)]
    if max(map(len, texts)) > LONGEST:
        return f"other {name}"
    return "{} {} and not {}".format(name, *texts)
