"""Trials of EDM, TD+EDM and windowed TD: each trained on one seed's draws, and its images scored.

A seed gives every method the same initial weights, images, noise levels and latents. EDM is scored
a second time, after as many more steps as make its training as long as TD's.
"""

import gc
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import packing
import states
import torch
from torch import Tensor

from tdkern.data import DatasetError, ImageDataset, step_indices
from tdkern.data.files import append_line, write_atomic
from tdkern.evaluation.detectors import key_of, make_detector
from tdkern.evaluation.features import squared_mmd
from tdkern.evaluation.fid import FeatureSums, features_of, frechet_distance
from tdkern.evaluation.intervals import some_images
from tdkern.training import CheckpointError, Options, Trainer, sample
from tdkern.training.distributed import this_process
from tdkern.training.sampling import NotFinite, sampling_levels

EDM, TD, WINDOWED, LONGER = "EDM", "TD+EDM", "windowed TD+EDM", "EDM, TD's compute"
METHODS = {
    EDM: {"td": False},
    TD: {"loss": {"weight": "online"}},
    WINDOWED: {"loss": {"weight": "online", "td_sigma": [0.3, 5.0]}},
}
BUDGETS = (5, 9, 12, 18)  # steps of Heun's method
EVALUATIONS = sum(2 * steps - 1 for steps in BUDGETS)  # of the network, for an image of each
CHECK = 50  # training steps between two looks at the clock
SAVING = 15  # seconds that are kept for writing a state


class Way(NamedTuple):
    """How a training step is run."""

    compile: bool
    cuda_graph: bool


WAYS = (Way(True, True), Way(False, True), Way(False, False))  # the first that works is taken


@dataclass(frozen=True)
class Scale:
    """How large the trials are."""

    cbase: int = 16
    cres: tuple[int, ...] = (2, 2, 3)  # 1.24 million parameters, whose states can be carried
    batch: int = 256
    samples: int = 5000
    at_once: int = 1000  # images of one batch that are sampled or looked at
    most_steps: int | None = None
    seeds: int | None = None  # without end
    precision: str = "bf16"
    ways: tuple[Way, ...] = WAYS


# for a rehearsal on a CPU
TINY = Scale(
    cbase=4,
    cres=(1,),
    batch=2,
    samples=2,
    at_once=2,
    most_steps=6,
    seeds=1,
    precision="fp32",
    ways=WAYS[-1:],
)


@dataclass
class Lease:
    """Where results go, and until when there is time."""

    out: Path
    ends: float  # of the clock
    scale: Scale = field(default_factory=Scale)
    about: dict = field(default_factory=dict)  # what every line of the results says of the machine
    clock: Callable[[], float] = time.monotonic

    def has(self, seconds: float) -> bool:
        """Whether there is time for what takes so long, and to write a state after it."""
        return self.clock() + seconds + SAVING < self.ends


class Results:
    """A file of JSON lines; one that a kill has torn is left out, and its work done again."""

    def __init__(self, path: Path):
        self.path, self.lines = path, []
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                continue
        whole = "".join(f"{json.dumps(line)}\n" for line in self.lines)
        if whole != text:
            write_atomic(path, whole.encode())

    def has(self, seed: int, method: str, steps: int) -> bool:
        place = {"seed": seed, "method": method, "steps": steps}
        return any(place.items() <= line.items() for line in self.lines)

    def add(self, line: dict) -> None:
        append_line(self.path, json.dumps(line))
        self.lines.append(line)
        print(line, flush=True)


class Images:
    """A data set as a whole on the device."""

    def __init__(self, path: Path, device: torch.device):
        self.path, dataset = path, ImageDataset(path, use_labels=True)
        pixels, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
        self.pixels, self.labels = torch.stack(pixels).to(device), torch.stack(labels).to(device)

    def batches(self, options: Options, first: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of so many training steps, as the driver's loader has them."""
        size, steps = len(self.pixels), range(first, first + count)
        indices = [step_indices(size, options.batch, options.seed, step) for step in steps]
        # in one copy: each would wait for the steps before it
        for chosen in torch.stack(indices).to(self.pixels.device):
            yield self.pixels[chosen], self.labels[chosen]


class Scorer:
    """Distances of a network's images from the real ones, in a detector's features."""

    def __init__(self, images: Images, scale: Scale, detector):
        self.scale, self.detector, self.device = scale, detector, images.pixels.device
        real = self._features(images.pixels.split(scale.at_once))
        self.reference = real.statistics()
        self.real = some_images(torch.cat(real.features)).to(self.device)

    def _features(self, batches: Iterable[Tensor]) -> FeatureSums:
        sums = FeatureSums(self.detector, self.device, keep=True)
        for images in batches:
            sums.add(features_of(images, self.detector, self.device))
        return sums

    def __call__(self, net, network: dict, steps: int, seed: int) -> dict[str, float]:
        """The distances of the images that the network makes in so many steps of Heun's method."""
        levels, options = sampling_levels(net, "heun", steps)
        first, count = seed * self.scale.samples, self.scale.samples
        seeds = torch.arange(first, first + count).split(self.scale.at_once)
        made = self._features(
            sample(net, network, part.tolist(), levels, **options) for part in seeds
        )
        features = torch.cat(made.features).to(self.device)
        return {
            key_of("frechet", self.detector): frechet_distance(made.statistics(), self.reference),
            key_of("kernel", self.detector): squared_mmd(features, self.real).item(),
        }


class Plan(NamedTuple):
    """What the first lease found to fit, and all others keep to."""

    steps: int  # of training
    longer: int  # of EDM's training at TD's compute
    way: Way
    setup_s: float  # until a run has its first CHECK steps
    score_s: float  # for an image of each of BUDGETS

    def write(self, path: Path) -> None:
        write_atomic(path, json.dumps(self._asdict(), indent=1).encode())

    @classmethod
    def read(cls, path: Path) -> "Plan | None":
        if not path.exists():
            return None
        facts = json.loads(path.read_text())
        return cls(**facts | {"way": Way(*facts["way"])})

    def stops(self, method: str) -> dict[str, int]:
        """After how many steps a method's network is scored, by the name in the results."""
        if method == EDM:
            return {EDM: self.steps, LONGER: self.longer}
        return {method: self.steps}


class Run:
    """A method's training on a seed, with the time and memory of its steps.

    Args:
        options: the run's.
        images: what is learnt.
        clock: in seconds.
        state: to go on from; None starts.

    Attributes:
        ms: milliseconds of a step, of every CHECK steps.
        memory_mib: the most that a step takes on a GPU.
    """

    def __init__(self, options: Options, images: Images, clock, state: Path | None = None):
        gc.collect()  # the run before it, whose graph would keep its memory
        self.images, self.clock, self.process = images, clock, this_process()
        self.on_gpu = self.process.device.type == "cuda"
        self.ms: list[float] = []
        self.memory_mib = None
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch._dynamo.reset()
            # the batches of a run never change their size
            torch._dynamo.config.automatic_dynamic_shapes = False
            torch.cuda.reset_peak_memory_stats()
            self.memory_before = torch.cuda.memory_allocated()
        self.trainer = Trainer(options, self.process, state)

    def train(self, count: int) -> float:
        """Train for so many steps; returns the milliseconds of one."""
        began, trainer = self.clock(), self.trainer
        for images, labels in self.images.batches(trainer.options, trainer.step, count):
            trainer.train_step(images, labels)
        if self.on_gpu:
            torch.cuda.synchronize()
            most = torch.cuda.max_memory_allocated() - self.memory_before
            self.memory_mib = self.memory_mib or most / 2**20  # not that of sampling after it
        self.ms.append(1e3 * (self.clock() - began) / count)
        return self.ms[-1]

    def facts(self) -> dict:
        """What a line of the results says of the training."""
        trainer = self.trainer
        return {
            "images": trainer.nimg,
            "batch": trainer.options.batch,
            "parameters": sum(param.numel() for param in trainer.net.parameters()),
            # the first steps compile
            "step_ms": statistics.median(self.ms[1:]) if self.ms[1:] else None,
            "memory_mib": self.memory_mib,
            "skipped": trainer.optimizer.skipped.item(),
        }


class Trials:
    """The trials of a lease.

    Args:
        lease: where and until when.
        images: what is learnt.
        detector: whose features images are scored in.
    """

    def __init__(self, lease: Lease, images: Images, detector):
        self.lease, self.images = lease, images
        self.results = Results(lease.out / "results.jsonl")
        self.scorer = Scorer(images, lease.scale, detector)

    def run(self) -> None:
        """As many trials as there is time for, in the order of the seeds."""
        plan = Plan.read(self.lease.out / "plan.json") or self._first_plan()
        seeds = self.lease.scale.seeds
        for seed in itertools.count() if seeds is None else range(seeds):
            for method in METHODS:
                if not self._trial(plan, seed, method):
                    return

    # ---- what fits --------------------------------------------------------------------------

    def _first_plan(self) -> Plan:
        """What lets the three methods of a seed, and EDM's longer run, fill the lease."""
        way, took, td_ms, edm_ms, score_s = self._measured()
        scale = self.lease.scale
        left = self.lease.ends - self.lease.clock()
        # windowed TD takes no longer than TD, and EDM's longer run as long; networks that were
        # compiled before are compiled faster
        training = left - 2 * took - SAVING - 4 * scale.samples * score_s
        steps = max(int(1e3 * training / (3 * td_ms)) // CHECK * CHECK, CHECK)
        steps = min(steps, scale.most_steps or steps)
        plan = Plan(steps, max(round(steps * td_ms / edm_ms), steps), way, took, score_s)
        plan.write(self.lease.out / "plan.json")
        print(plan, flush=True)
        return plan

    def _measured(self) -> tuple[Way, float, float, float, float]:
        """The first way that works here, with what `_times` measures."""
        *others, last = self.lease.scale.ways
        for way in others:
            try:
                return way, *self._times(way)
            except Exception as error:  # what this machine cannot compile, or not capture
                print(f"{way} does not work here: {type(error).__name__}: {error}", flush=True)
        return last, *self._times(last)

    def _times(self, way: Way) -> tuple[float, float, float, float]:
        """Seconds until TD trains, ms of a step of TD and of EDM, seconds to score an image."""
        few = min(CHECK, self.lease.scale.most_steps or CHECK)
        began = self.lease.clock()
        run = self._begun(TD, way)
        run.train(few)
        took = self.lease.clock() - began
        td_ms, score_s = run.train(few), self._score_seconds(run)
        run = self._begun(EDM, way)
        run.train(few)
        return took, td_ms, run.train(few), score_s

    def _begun(self, method: str, way: Way) -> Run:
        """A run of a method that is thrown away."""
        options = self._options(Plan(CHECK, CHECK, way, 0, 0), 0, method)
        return Run(options, self.images, self.lease.clock)

    def _score_seconds(self, run: Run) -> float:
        """Of an image of each of BUDGETS."""
        steps, trainer = BUDGETS[0], run.trainer
        for _ in range(2):  # kernels are chosen in the first
            began = self.lease.clock()
            self.scorer(trainer.ema.module, trainer.network, steps, 0)
            seconds = (self.lease.clock() - began) / self.lease.scale.samples
        return seconds * EVALUATIONS / (2 * steps - 1)

    def _options(self, plan: Plan, seed: int, method: str) -> Options:
        scale = self.lease.scale
        mimg = plan.steps * scale.batch / 1e6
        return Options(
            data=str(self.images.path),
            cond=True,
            cbase=scale.cbase,
            cres=list(scale.cres),
            batch=scale.batch,
            duration=mimg * plan.longer / plan.steps,
            lr_rampup_kimg=50 * mimg,
            ema=0.05 * mimg,
            dropout=0.0,
            augment=0.0,
            precision=scale.precision,
            compile=plan.way.compile,
            cuda_graph=plan.way.cuda_graph,
            bench=True,
            workers=0,
            seed=seed,
            **METHODS[method],
        )

    # ---- one trial --------------------------------------------------------------------------

    def _trial(self, plan: Plan, seed: int, method: str) -> bool:
        """Train and score a method on a seed; False where the time ended first, all being saved."""
        stops = plan.stops(method)
        if all(self.results.has(seed, name, steps) for name in stops for steps in BUDGETS):
            return True
        if not self.lease.has(plan.setup_s):
            return False
        run = self._run(self._options(plan, seed, method), [seed, method])
        done = all(self._stop(plan, run, seed, name, stop) for name, stop in stops.items())
        if done:
            states.remove(self.lease.out)
        else:
            states.pack(self.lease.out, [seed, method], run.trainer)
        return done

    def _run(self, options: Options, place: list) -> Run:
        """A run that goes on from its state, if there is one that is whole."""
        with states.unpacked(self.lease.out, place) as state:
            try:
                return Run(options, self.images, self.lease.clock, state)
            except CheckpointError as error:
                print(f"it begins anew: {error}", flush=True)
        return Run(options, self.images, self.lease.clock)

    def _stop(self, plan: Plan, run: Run, seed: int, name: str, stop: int) -> bool:
        """Train until a stop and score there; False where the time ended before."""
        trainer = run.trainer
        todo = [steps for steps in BUDGETS if not self.results.has(seed, name, steps)]
        if trainer.step > stop:
            return True
        ms = math.inf
        while trainer.step < stop:
            ms = min(ms, run.train(min(CHECK, stop - trainer.step)))  # the first steps compile
            if trainer.step < stop and not self.lease.has(ms * CHECK / 1e3):
                return False
        for steps in todo:
            share = (2 * steps - 1) / EVALUATIONS
            if not self.lease.has(plan.score_s * self.lease.scale.samples * share):
                return False
            self.results.add(self._line(plan, run, seed, name, steps))
        return True

    def _line(self, plan: Plan, run: Run, seed: int, name: str, steps: int) -> dict:
        """A line of the results, with the scores or why there are none."""
        try:
            scores = self.scorer(run.trainer.ema.module, run.trainer.network, steps, seed)
        except NotFinite as error:
            scores = {"failure": str(error)}
        place = {"seed": seed, "method": name, "steps": steps}
        samples = {"samples": self.lease.scale.samples, "detector": self.scorer.detector.identity}
        way = plan.way._asdict()
        return place | scores | run.facts() | samples | way | self.lease.about


def run(lease: Lease, folder: Path) -> None:
    """The trials of a lease.

    folder: holds the images that packing.py has packed, and a detector.
    """
    source, detector = folder / "images.zip.gz", folder / "detector.safetensors"
    if not source.exists():
        raise DatasetError(f"{source}: is not there; make it with bench/gpu/packing.py")
    if not detector.exists():
        raise DatasetError(f"{detector}: is not there; make it with tdkern detector train")
    device = this_process().device
    with tempfile.TemporaryDirectory() as own:
        path = Path(own, "images.zip")
        packing.unpack(source, path)
        Trials(lease, Images(path, device), make_detector(detector, device)).run()
