"""The FID of a run's averaged network while it trains, at several numbers of sampling steps."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import ImageDataset
from ..evaluation.detectors import key_of, make_detector
from ..evaluation.fid import FeatureSums, features_of, frechet_distance, read_statistics
from ..evaluation.unfinished import Unfinished, add_up
from ..families import default_sampler
from ..networks.precond import Preconditioned
from ..networks.saved import fingerprint
from ..samplers import SAMPLERS
from .distributed import Process, agree
from .options import Options
from .sampling import NotFinite, sample, sampling_levels
from .statistics import Fid

BATCH = 64  # images at once: any number of processes draws the same


@contextmanager
def kept_generators(process: Process) -> Iterator[None]:
    """Behind it torch's generators are as they were before."""
    devices = [process.device] if process.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


class FidMeter:
    """What measures a run's FIDs.

    The images are those of the seeds from 0 each time, by the sampler of the network's family, so
    that `tdkern fid steps` finds the same of a snapshot.

    Args:
        options: the run's, with fid_ref.
        process: this process's place; every process of the run makes one.
        dataset: the run's, whose classes or labels the images have.
        network: the description of the run's network.

    Attributes:
        metric: the name of what is measured: "fid", or with another detector than Inception such as
            "frechet_cifar10".
        against: of the first process, a hash of the reference: only FIDs to one are compared.

    Raises:
        ImportError: the detector needs what is not installed.
        ValueError: the detector or the reference cannot be had, or do not fit together.
    """

    def __init__(self, options: Options, process: Process, dataset: ImageDataset, network: dict):
        self.num, self.process = options.fid_num, process
        self.dataset, self.network = dataset, network
        with kept_generators(process):
            self.detector = make_detector(options.fid_detector, process.device)
        agree(process, fid_detector=self.detector.identity)
        self.metric, self.against = key_of("frechet", self.detector), ""
        if process.rank == 0:
            self.reference = read_statistics(options.fid_ref, self.detector)
            mu, sigma = map(torch.from_numpy, (self.reference.mu, self.reference.sigma))
            self.against = fingerprint({"mu": mu, "sigma": sigma})[:12]

    def kind(self, steps: int) -> tuple:
        """The `Fid.kind` of what is measured at so many steps; in the first process."""
        return self.metric, self.num, self.against, steps

    def measure(
        self,
        net: Preconditioned,
        steps: int,
        path: Path | None,
        tell: Callable[[str], object],
        asked: Callable[[], int],
    ) -> tuple[int, Fid | None]:
        """One FID; every process has to call it.

        Args:
            net: the averaged network, whole.
            steps: of the sampler.
            path: the file of what is measured so far; None but in the first process.
            tell: what is told of it, in a line.
            asked: behind each batch, the signal by which the run is to end; 0 to go on.

        Returns:
            The signal that ended it before its end, or 0; and the FID, in the first process. It is
            NaN where images are not finite.
        """
        sampler = default_sampler(net, steps_given=True)
        levels, options = sampling_levels(net, sampler, steps)
        inputs = {"levels": levels.tolist(), "sampler": sampler, "num": self.num}
        if path:
            inputs |= {"weights": fingerprint(net.state_dict())}
        file = Unfinished(path, inputs | {"detector": self.detector.identity}, tell)
        sums = FeatureSums(self.detector, self.process.device)
        file.load(sums)
        options |= {"sampler": SAMPLERS[sampler].sample}
        draw = partial(sample, net, self.network, sigmas=levels, **options)
        with kept_generators(self.process):
            signum = self._add_up(sums, draw, file, asked)
        if signum:
            file.save(sums)
            return signum, None
        file.remove()
        if self.process.rank > 0:
            return 0, None
        finite = sums.sums.isfinite().all()
        value = frechet_distance(sums.statistics(), self.reference) if finite else math.nan
        nfe = SAMPLERS[sampler].evaluations(len(levels) - 1)
        return 0, Fid(self.metric, steps, nfe, value, self.num, self.against)

    def _add_up(
        self, sums: FeatureSums, draw: Callable, file: Unfinished, asked: Callable[[], int]
    ) -> int:
        """Add all images that are not in yet, until images are not finite or the run is to end.

        Returns:
            The signal by which it is to end, or 0.
        """
        rank, world, _ = self.process
        batches = torch.arange(self.num).split(BATCH)[-(-sums.count // BATCH) :]
        signum = 0

        def after_turn(sums: FeatureSums) -> bool:
            nonlocal signum
            signum = asked()
            broken = bool(sums.sums[1].isnan())  # of a sum that every image has a part in
            if not (signum or broken):
                file.after_turn(sums)
            return bool(signum) or broken

        features = self._features(draw, batches[rank::world])
        add_up(sums, features, -(-len(batches) // world), after_turn)
        return signum

    def _features(self, draw: Callable, batches: tuple[Tensor, ...]) -> Iterator[Tensor]:
        """[B, dim] for each batch of seeds; NaN, which all processes see, of such images."""
        quiet = self.process.rank > 0 or sys.stderr is None or not sys.stderr.isatty()
        for seeds in tqdm(batches, desc=self.metric, unit="batch", leave=False, disable=quiet):
            try:
                images = draw(seeds=seeds.tolist(), **self._labels(seeds))
            except NotFinite:
                device = self.process.device
                yield torch.full((len(seeds), self.detector.dim), math.nan, device=device)
            else:
                yield features_of(images, self.detector, self.process.device)

    def _labels(self, seeds: Tensor) -> dict:
        """What the images of these seeds show: labels that are vectors, of the data set's."""
        if self.dataset.classes != []:
            return {"classes": self.dataset.classes}
        labels = torch.from_numpy(self.dataset.labels)
        return {"labels": labels[seeds % len(labels)]}
