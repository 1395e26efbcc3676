"""Frechet inception distance: how far the statistics of two sets of images lie apart, in the
features of an Inception network.
"""

import io
import lzma
import math
import pickle
import time
import tokenize
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..data.files import check_file, one_line, read_file, write_atomic
from .features import gathered

IDENTITY = "detector"  # the array of a file of statistics that names their detector
MAX_ARRAY = 1 << 27  # bytes, of 4096 features in float64
MAX_FEATURES = 1 << 30  # bytes, of 131,072 images' 2048 in float32
MAX_STATISTICS = MAX_FEATURES + (1 << 28)  # bytes of a file
MAX_DOWNLOAD = 1 << 28  # bytes of statistics from an address
MAX_DETECTOR = 1 << 28  # bytes of Inception's weights, which have 95 million
PATIENCE = 10  # seconds for a server to answer, and before its rate counts
LEAST_RATE = 20_000  # bytes a second
# what comes of an .npz file that is none, or damaged
WRONG_ARRAY = (
    ValueError,
    LookupError,
    TypeError,
    SyntaxError,
    MemoryError,
    RecursionError,
    RuntimeError,
    NotImplementedError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


class Statistics(NamedTuple):
    """Mean and covariance of feature vectors."""

    mu: np.ndarray  # [d] float64
    sigma: np.ndarray  # [d, d] float64, with divisor n - 1
    detector: str = ""  # the identity of the detector whose features they are; "" if not known


class Inception:
    """The Inception-v3 of the original FID (arXiv 1706.08500), as torch-fidelity has it: images to
    the 2048 features after its pooling.

    Called with images [B, 3, H, W] uint8, which it resizes to 299 x 299 as TensorFlow 1 did, it
    gives [B, 2048] float32. Nothing in the weights' file is executed. No gradient. Deterministic on
    a CPU.

    Args:
        weights: torch-fidelity's file of weights; None takes torch.hub's copy of it, which is
            downloaded where there is none.
        device: where it computes.

    Raises:
        ImportError: torch-fidelity or its torchvision does not work here.
        ValueError: the weights cannot be had, read or used.
    """

    dim = 2048
    name = "inception"
    identity = "inception-v3"

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (
                URL_INCEPTION_V3,
                FeatureExtractorInceptionV3,
            )
        except (ImportError, RuntimeError) as error:
            # RuntimeError: torchvision is built for another torch
            raise ImportError(
                f"fid needs torch-fidelity and the torchvision of your torch ({error}); run: pip "
                "install 'tdkern[evaluation]'"
            ) from error
        path = _fetched(URL_INCEPTION_V3) if weights is None else Path(weights)
        try:
            check_file(path, MAX_DETECTOR)
            # torch-fidelity unpickles whatever a file holds, so it gets what is left of the file
            # when only tensors are read
            tensors = io.BytesIO()
            torch.save(torch.load(path, map_location="cpu", weights_only=True), tensors)
            tensors.seek(0)
            self.module = FeatureExtractorInceptionV3(
                "inception-v3-compat", [str(self.dim)], feature_extractor_weights_path=tensors
            ).to(device)
        except (
            OSError,
            EOFError,
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
            pickle.UnpicklingError,
        ) as error:
            reason = f"{error}".partition("\n")[0]
            raise ValueError(
                f"{path}: does not hold Inception's weights ({reason}); fetch {URL_INCEPTION_V3} "
                "and give it as --detector"
            ) from error

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images)[0]


def _fetched(url: str) -> Path:
    """torch.hub's copy of a file whose name carries the beginning of its SHA-256."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=False
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{path}: cannot be downloaded ({error}); fetch {url} elsewhere and give it as "
                "--detector"
            ) from error
    return path


class FeatureSums:
    """What the mean and covariance of features are made of, added up turn by turn.

    In a turn each process has the features of a batch, or none any more. Where processes are
    joined, every one has the sums over all.

    mu = sum x / n,  sigma = (sum x x^T - n mu mu^T) / (n - 1), in float64.

    Deterministic; of the number of processes the sums depend by float64's rounding.

    Args:
        detector: whose features they are; of it `dim` is asked for, and `identity` if it has one.
        device: where the sums are, the process group's.
        keep: whether to keep the features too.

    Attributes:
        sums: [1 + dim + dim^2] float64: n, sum x and sum x x^T.
        features: with `keep`, [B, dim] float32 on the CPU for each turn, in the order in which one
            process would have had the batches.
    """

    def __init__(self, detector, device: torch.device | str = "cpu", *, keep: bool = False):
        self.dim, self.identity = detector.dim, getattr(detector, "identity", "")
        self.device, self.keep = device, keep
        size = 1 + self.dim + self.dim**2
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)
        self.features: list[Tensor] = []

    @property
    def count(self) -> int:
        """Images so far; waits for the device."""
        return int(self.sums[0])

    def add(self, features: Tensor) -> None:
        """A turn; every process has to call it, also one without images.

        Args:
            features: [B, dim], this process's.
        """
        x = features.double()
        total = x.new_tensor([len(x)])
        turn = torch.cat([total, x.sum(0), (x.T @ x).flatten()])
        if dist.is_initialized():
            dist.all_reduce(turn)
        self.sums += turn
        if self.keep:
            self.features.append(gathered(features, self.device))

    def statistics(self) -> Statistics:
        """Mean and covariance; raises ValueError for fewer than two images."""
        n = self.count
        if n < 2:
            raise ValueError(f"FeatureSums: a covariance needs at least 2 images, got {n}")
        _, total, outer = self.sums.split([1, self.dim, self.dim**2])
        mu = total / n
        sigma = (outer.view(self.dim, self.dim) - n * torch.outer(mu, mu)) / (n - 1)
        return Statistics(mu.cpu().numpy(), sigma.cpu().numpy(), self.identity)


@torch.no_grad()
def features_of(images: Tensor, detector, device: torch.device | str = "cpu") -> Tensor:
    """[B, dim], a detector's features of images [B, 1 or 3, H, W] uint8, grey ones as RGB."""
    return detector(images.to(device).expand(-1, 3, -1, -1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Frechet distance of two Gaussians, FID where they are Inception's (arXiv 1706.08500,
    eq. 6).

    |mu_a - mu_b|^2 + tr sigma_a + tr sigma_b - 2 tr (sigma_a sigma_b)^(1/2)

    The last trace is the sum of the singular values of sigma_a^(1/2) sigma_b^(1/2), with the roots
    from eigendecompositions, which holds for singular covariances too. Deterministic.

    Args:
        a, b: of as many features.

    Raises:
        ValueError: they are not.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(
            f"frechet_distance: b must have {len(a.mu)} features as a has, got {len(b.mu)}"
        )
    cross = np.linalg.svd(_root(a.sigma).T @ _root(b.sigma), compute_uv=False)
    return float(
        np.square(a.mu - b.mu).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross.sum()
    )


def _root(sigma: np.ndarray) -> np.ndarray:
    """R [d, d] with R R^T = sigma."""
    values, vectors = np.linalg.eigh(sigma)
    return vectors * np.sqrt(values.clip(0))


def read_statistics(source: str | Path, detector=None) -> Statistics:
    """Statistics from an .npz with `mu` and `sigma`, such as EDM's reference files; nothing in it
    is executed.

    Args:
        source: a file, or its address, http:// or https://.
        detector: whose features they must be of, if given; EDM's files do not say it, and then the
            number of features must be its.

    Raises:
        ValueError: it cannot be had, or does not hold such statistics.
    """
    mu, sigma, identity = _read_arrays(
        source, ("mu", "sigma", IDENTITY), MAX_ARRAY, "tdkern fid ref"
    )
    if (
        mu.ndim != 1
        or sigma.shape != mu.shape * 2
        or not (np.isfinite(mu).all() and np.isfinite(sigma).all())
    ):
        raise ValueError(
            f"{source}: mu must be [d] and sigma [d, d], both finite, got {list(mu.shape)} and "
            f"{list(sigma.shape)}; "
            "make one with tdkern fid ref"
        )
    statistics = Statistics(mu, sigma, one_line(identity.tobytes().decode("ascii", "replace")))
    if detector is not None:
        _check_detector(source, statistics, detector)
    return statistics


def _check_detector(source: str | Path, statistics: Statistics, detector) -> None:
    """Raise ValueError for statistics of another detector's features."""
    count, known = len(statistics.mu), statistics.detector
    if known not in ("", detector.identity) or count != detector.dim:
        raise ValueError(
            f"{source}: must have the {detector.dim} features of {detector.identity}, got {count} "
            f"of {known or 'a detector that it does not name'}; make it with tdkern fid ref and "
            "the same --detector"
        )


def read_features(source: str | Path) -> Tensor:
    """[N, d] float32, the `features` of an .npz file of `tdkern fid ref --features`.

    Nothing in it is executed.

    Args:
        source: as of `read_statistics`.

    Raises:
        ValueError: it cannot be had, or does not hold features.
    """
    make = "tdkern fid ref --features"
    (features,) = _read_arrays(source, ("features",), MAX_FEATURES, make)
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(
            f"{source}: features must be [N, d], all finite, got {list(features.shape)}; make one "
            f"with {make}"
        )
    return torch.from_numpy(features.astype(np.float32))


def is_address(source: str | Path) -> bool:
    """Whether statistics are at an address, and not in a file."""
    return str(source).startswith(("http://", "https://"))


def _read_arrays(
    source: str | Path, names: tuple[str, ...], most: int, make: str
) -> list[np.ndarray]:
    """Arrays of an .npz file or address, each of at most so many bytes; `make` makes one."""
    try:
        if is_address(source):
            data = _download(str(source))
        else:
            data = read_file(source, MAX_STATISTICS)
        with zipfile.ZipFile(io.BytesIO(data)) as arrays:
            return [_array(arrays, name, most) for name in names]
    except (OSError, HTTPException, EOFError, *WRONG_ARRAY) as error:
        raise ValueError(
            f"{source}: not an .npz file of {' and '.join(names)} ({one_line(error)[:200]}); make "
            f"one with {make}"
        ) from error


def _array(arrays: zipfile.ZipFile, name: str, most: int) -> np.ndarray:
    """One array of an .npz file, mu and sigma as float64; what its header asks for must be there
    before memory is taken. Where there is no IDENTITY it is empty.
    """
    if name == IDENTITY and f"{name}.npy" not in arrays.namelist():
        return np.frombuffer(b"", np.uint8)
    info = arrays.getinfo(f"{name}.npy")
    if info.file_size > most:
        raise ValueError(f"{name} has {info.file_size:,} bytes, more than the {most:,} allowed")
    file = io.BytesIO(arrays.read(info))
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, fortran, dtype = read_header[version](file)
    kinds = "S" if name == IDENTITY else "fiu"
    if dtype.kind not in kinds or math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
        raise ValueError(f"{name} does not hold the numbers that its header says")
    array = np.frombuffer(file.getbuffer(), dtype, offset=file.tell())
    array = array.reshape(shape, order="F" if fortran else "C")
    return array.astype(np.float64) if name in ("mu", "sigma") else array


def _download(url: str) -> bytes:
    """The content of an address: bounded in size, and in time by a least rate."""
    began, parts, size = time.monotonic(), [], 0
    with urlopen(url, timeout=PATIENCE) as response:
        while part := response.read1(1 << 20):
            parts.append(part)
            size += len(part)
            seconds = time.monotonic() - began
            if size > MAX_DOWNLOAD:
                raise OSError(
                    f"more than the {MAX_DOWNLOAD:,} bytes allowed; fetch it and give the file"
                )
            if seconds > PATIENCE and size < LEAST_RATE * seconds:
                raise OSError(
                    f"slower than {LEAST_RATE:,} bytes a second; fetch it and give the file"
                )
    return b"".join(parts)


def write_statistics(
    path: str | Path, statistics: Statistics, features: Tensor | None = None
) -> None:
    """Write an .npz with `mu` and `sigma`, whole or not at all; what reads EDM's reference files
    reads it. It holds the detector's identity too, as bytes, and features [N, d], if they are
    given.
    """
    file = io.BytesIO()
    arrays: dict[str, Any] = {"mu": statistics.mu, "sigma": statistics.sigma}
    if statistics.detector:
        arrays[IDENTITY] = np.bytes_(statistics.detector.encode())
    if features is not None:
        arrays["features"] = features.numpy()
    np.savez(file, **arrays)
    write_atomic(path, file.getvalue())
