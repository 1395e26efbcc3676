"""Labels of a data set, from dataset.json."""

import json
import math

import numpy as np

MAX_CLASSES = 1 << 16  # a label is that many numbers
LARGEST = float(np.finfo(np.float32).max)


def limit(images: int) -> int:
    """How many bytes dataset.json may have: a label of some hundred numbers for each image."""
    return (1 << 20) + (1 << 14) * images


def parse(data: bytes, names: list[str]) -> np.ndarray:
    """The labels of images, from dataset.json.

    Args:
        data: {"labels": [[name, label], ...]}; a label is a class, an integer from 0, or a vector.
        names: of the images.

    Returns:
        Classes, int64 [N], or vectors, float32 [N, label_dim].

    Raises:
        ValueError: it is something else; the message says what.
    """
    try:
        table = {name.replace("\\", "/"): label for name, label in json.loads(data)["labels"] or ()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f'must be {{"labels": [[name, label], ...]}} ({type(error).__name__}: {error})'
        ) from error
    if not table:
        raise ValueError("has no labels; train without labels or add them")
    names = [name.replace("\\", "/") for name in names]  # in zips of some Windows programs
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(f"has no label for {missing[0]} and {len(missing) - 1} more; add them")
    labels = [table[name] for name in names]
    if all(type(label) is int and label >= 0 for label in labels):
        return _classes(labels)
    first = labels[0]
    if all(type(label) is list and len(label) == len(first) > 0 for label in labels):
        if all(type(x) in (int, float) for label in labels for x in label):
            return _vectors(labels, names)
    raise ValueError("labels must all be classes (integers from 0) or all vectors of one length")


def _classes(labels: list[int]) -> np.ndarray:
    if max(labels) >= MAX_CLASSES:
        raise ValueError(
            f"classes must be below {MAX_CLASSES}, got {min(max(labels), 10**30)}; "
            "number them from 0 without gaps"
        )
    return np.array(labels, np.int64)


def _vectors(labels: list[list], names: list[str]) -> np.ndarray:
    if len(labels[0]) > MAX_CLASSES:
        raise ValueError(f"a vector must have at most {MAX_CLASSES} numbers, got {len(labels[0])}")
    for name, label in zip(names, labels, strict=True):
        if not all(_is_float32(x) for x in label):
            raise ValueError(f"the label of {name} is not finite in float32; correct or remove it")
    return np.array(labels, np.float32)


def _is_float32(x: int | float) -> bool:
    return abs(x) <= LARGEST and not math.isnan(x)
