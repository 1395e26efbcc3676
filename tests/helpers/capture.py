"""CUDA graphs without a GPU, in two halves.

`OnDevice`: a step on torch's "meta" device, which has no number that the host could read, and whose
every copy from the host is seen. `graphed`: a step on the CPU, recorded with its tensors and done
again. As in a graph, an operation of a replay reads and writes the memory that it had in the
capture, and the host's numbers are those of then. A capture leaves all memory as it was; what the
step allocates holds no number until a replay writes it.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdkern.training import graph as graph_module
from tdkern.training.graph import StepGraph


class OnDevice(TorchDispatchMode):
    """Operations with the shapes of what they give, none of which may see the host's memory."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        # an empty tensor has no memory: it says which modes are on
        of_host = [t.numel() for t in tensors_in(args, kwargs, out) if t.device.type == "cpu"]
        assert not any(of_host), f"{func} has to do with the host's memory"
        self.seen.append((func, [tensor.shape for tensor in tensors_in(out)]))
        return out


class Watched(TorchDispatchMode):
    """Operations as they are. The ops of tdkern then look at no number, as on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


def memory_of(tensor):
    """All bytes of the memory that a tensor lies in."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


def tensors_in(*values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def written_by(func, args):
    """The tensors among an operation's arguments that it writes."""
    written = [
        arg
        for arg, declared in zip(args, func._schema.arguments, strict=False)
        if declared.alias_info is not None and declared.alias_info.is_write
    ]
    return tensors_in(*written)


class Recording(TorchDispatchMode):
    """The capture of a `Graph`."""

    def __init__(self, graph, default):
        super().__init__()
        self.graph, self.default, self.made, self.kept = graph, default, {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        for tensor in written_by(func, args):
            memory = memory_of(tensor)
            if memory.data_ptr() not in self.made | self.kept:
                self.kept[memory.data_ptr()] = memory, memory.clone()
        given = {memory_of(tensor).data_ptr() for tensor in tensors_in(args, kwargs)}
        out = func(*args, **kwargs)
        for tensor in tensors_in(out):
            memory = memory_of(tensor)
            if memory.data_ptr() not in given:
                self.made[memory.data_ptr()] = memory
        self.graph.calls.append((func, args, kwargs, out))
        return out

    def __enter__(self):
        self.default.graph = self.graph
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.default.graph = None
        for memory, before in self.kept.values():
            memory.copy_(before)
        for memory in self.made.values():
            memory.fill_(255)  # NaN, or -1


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.calls, self.generators, self.replays = [], [], 0

    def register_generator_state(self, generator):
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors_in(out), tensors_in(again), strict=True):
                assert old.shape == new.shape and old.stride() == new.stride()
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Default:
    """In place of a GPU's global generator: torch's own of the CPU, in the state of another."""

    def __init__(self):
        self.graph, self.own = None, torch.Generator()

    def graphsafe_get_state(self):
        return self.own

    def graphsafe_set_state(self, generator):
        self._go_over(self.own, generator)
        if self.graph is not None:
            assert generator in self.graph.generators
            self.graph.calls.append((self._go_over, (self.own, generator), {}, None))
        self.own = generator

    @staticmethod
    def _go_over(before, generator):
        before.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(generator.get_state())


def graphed(trainer, monkeypatch):
    """Let a trainer on the CPU capture its steps; returns the graphs, as they are captured."""
    graphs, default = [], Default()

    def capture(graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        graphs.append(graph)
        return Recording(graph, default)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        CUDAGraph=Graph,
        graph=capture,
        Stream=lambda device: stream,
        current_stream=lambda device: stream,
        stream=lambda own: nullcontext(),
        default_generators={None: default},  # the CPU has no index
    )
    monkeypatch.setattr(graph_module, "cuda", cuda)
    trainer.run_step = StepGraph(trainer._step, trainer.seeds, trainer.process.device)
    return graphs
