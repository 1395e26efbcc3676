"""A training step captured once as a CUDA graph and replayed: the host launches one thing a step.

A graph holds kernels, their arguments and the memory that they work on. So whatever changes from
step to step is in tensors on the device, or is the seed of a generator that the graph knows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Generator, Tensor, cuda

from ..data import derive_seed
from ..losses import Loss
from ..losses.masks import masks_begin_again

# steps before a capture, in which libraries, Triton and torch.compile set themselves up
WARM_UP = 3


class CaptureError(RuntimeError):
    """A step that no CUDA graph can hold; nothing of it has run."""


class Draws(NamedTuple):
    """Where draws of a step begin, and the generators that they take in a CUDA graph."""

    place: tuple  # a kind and numbers, as of `derive_seed`
    first: Generator
    again: Generator  # for draws that repeat those of `first`


class Seeds:
    """Where the random numbers of a step begin: every kind of draw has a seed of its own.

    All draws take the global generators of the CPU and of CUDA, which `begin` sets: what a step
    draws depends on nothing before it, so a resumed run needs no generator's state. While a CUDA
    graph is captured, `begin` has the global generator take a state that the graph knows. `sow`
    gives these the same seeds before a replay, and so the same numbers are drawn.

    Args:
        seed: the run's.
        device: the images'.
    """

    def __init__(self, seed: int, device: torch.device):
        self.seed, self.device, self.step = seed, device, 0
        self.places: list[tuple] = []  # where draws of this step began so far
        self.last: list[tuple] = []  # and of the step before
        self.draws: list[Draws] = []  # of the graph
        self.capturing: Iterator[Draws] | None = None

    def start(self, step: int) -> None:
        """From here on draws are those of this step."""
        self.step = step
        self.last, self.places = self.places, []

    def begin(self, kind: str, *numbers: int) -> None:
        """From here on draws are of this kind; `derive_seed` knows the kinds and their numbers."""
        place = (kind, *numbers)
        if self.capturing is None:
            self.places.append(place)
            torch.manual_seed(self._seed_of(place))
            return
        draws = next(self.capturing)
        assert draws.place == place
        self._global.graphsafe_set_state(draws.first)
        masks_begin_again.set(lambda: self._drawing_from(draws.again))

    def sow(self) -> None:
        """Let the graph's draws be those of this step, in its next replay."""
        for place, *generators in self.draws:
            for generator in generators:
                generator.manual_seed(self._seed_of(place))

    @contextmanager
    def captured(self, graph: cuda.CUDAGraph) -> Iterator[None]:
        """Inside, a step is captured that draws where the one before it did."""
        new = lambda: Generator(self.device)
        self.draws = [Draws(place, new(), new()) for place in self.last]
        for _, *generators in self.draws:
            for generator in generators:
                graph.register_generator_state(generator)
        before, token = self._global.graphsafe_get_state(), masks_begin_again.set(None)
        self.capturing = iter(self.draws)
        try:
            yield
        finally:
            self.capturing = None
            masks_begin_again.reset(token)
            self._global.graphsafe_set_state(before)

    @contextmanager
    def _drawing_from(self, generator: Generator) -> Iterator[None]:
        before = self._global.graphsafe_get_state()
        self._global.graphsafe_set_state(generator)
        yield
        self._global.graphsafe_set_state(before)

    @property
    def _global(self) -> Generator:
        return cuda.default_generators[self.device.index]

    def _seed_of(self, place: tuple) -> int:
        kind, *numbers = place
        return derive_seed(self.seed, kind, self.step, *numbers)


class StepGraph:
    """Training steps of which the first few run as they are, and the others replay a CUDA graph.

    A loss that a curriculum changes is captured anew, after as many steps as they are.

    Args:
        step: step(loss, images, labels) reads nothing that changes from step to step, but for its
            images and labels, from the host, and waits for nothing.
        seeds: where its draws begin.
        device: the images'.
    """

    def __init__(
        self, step: Callable[[Loss, Tensor, Tensor], None], seeds: Seeds, device: torch.device
    ):
        self.step, self.seeds, self.device = step, seeds, device
        # of the capture and of the steps before it: autograd adds gradients up on the stream on
        # which a parameter was first used
        self.stream = cuda.Stream(device)
        self.loss: Loss | None = None
        self.inputs: list[Tensor] = []  # images and labels, where the graph reads them
        self.graph: cuda.CUDAGraph | None = None
        self.steps = 0  # of this loss that ran as they are

    def __call__(self, loss: Loss, images: Tensor, labels: Tensor) -> None:
        """The step; arguments as of `step`.

        Raises:
            CaptureError: it cannot be captured.
        """
        if loss != self.loss:
            self.loss, self.graph, self.steps = loss, None, 0
        self._take(images, labels)
        if self.steps < WARM_UP:
            self._run(loss)
            self.steps += 1
            return
        if self.graph is None:
            self.graph = self._captured(loss)
        self.seeds.sow()
        self.graph.replay()

    def _take(self, *given: Tensor) -> None:
        if not self.inputs:
            self.inputs = [torch.empty_like(tensor, device=self.device) for tensor in given]
        for own, tensor in zip(self.inputs, given, strict=True):
            own.copy_(tensor, non_blocking=True)

    def _run(self, loss: Loss) -> None:
        current = cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with cuda.stream(self.stream):
            self.step(loss, *self.inputs)
        current.wait_stream(self.stream)

    def _captured(self, loss: Loss) -> cuda.CUDAGraph:
        graph = cuda.CUDAGraph()
        # other threads may go on meanwhile: the one that pins images allocates memory
        capture = cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        try:
            with self.seeds.captured(graph), capture:
                self.step(loss, *self.inputs)
        except Exception as error:
            reason = error.__context__ or error  # the end of a capture that failed fails too
            raise CaptureError(
                f"cuda_graph: the step cannot be captured ({reason}); go on without it"
            ) from error
        return graph
