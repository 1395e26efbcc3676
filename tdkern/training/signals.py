"""Runs that are asked to end: by a signal, by their time limit, or by the death of torchrun."""

import ctypes
import os
import signal
import sys
import threading
import time
from functools import partial

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SAME = (
    0.5  # seconds in which a signal that comes again is the same request, sent to the whole group
)
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent dies


class Stopped(Exception):
    """A run ended early, as it was asked to, with its state saved; `signum` is the signal."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """While it is entered, a first signal is remembered, and a second one ends the process at once.

    A signal that was ignored before, as SIGHUP is under nohup, stays ignored.

    Args:
        time_limit: minutes from now after which the run is as if it had got SIGTERM; None for none.
        world: number of processes of the run, all of which make one; they agree on when to end.
    """

    def __init__(self, time_limit: float | None, world: int = 1):
        self.signum = 0
        self.came = 0.0
        self.world = world
        self.deadline = time.monotonic() + 60 * time_limit if time_limit else float("inf")
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.group = dist.new_group(backend="gloo") if world > 1 else None  # of the hosts alone
        self.pending: tuple[torch.Tensor, dist.Work] | None = None
        self.before: dict = {}

    def __enter__(self) -> "StopRequest":
        listens = threading.current_thread() is threading.main_thread()  # others cannot
        for signum in SIGNALS if listens else ():
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self.before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, _) -> None:
        if self.signum and time.monotonic() - self.came > SAME:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if not self.signum:
            self.signum, self.came = signum, time.monotonic()

    def _own(self) -> int:
        """The signal that this process was asked to end by; 0 for none."""
        late = time.monotonic() > self.deadline
        orphaned = self.parent is not None and os.getppid() != self.parent
        return int(self.signum or (signal.SIGTERM if late or orphaned else 0))

    def asked(self) -> int:
        """After a step, the signal to end by, the same in all processes; 0 to go on.

        Of several processes the answer is that of the step before: nobody waits for it.
        """
        if self.group is None:
            return self._own()
        answer = self._answer()
        asked = torch.tensor(self._own())
        self.pending = asked, dist.all_reduce(asked, dist.ReduceOp.MAX, self.group, async_op=True)
        return answer

    def _answer(self) -> int:
        if self.pending is None:
            return 0
        asked, exchange = self.pending
        exchange.wait()
        self.pending = None
        return int(asked)

    def meet(self) -> None:
        """Wait for the other processes: torchrun ends all once the first has ended."""
        if self.group is not None:
            self._answer()
            dist.barrier(self.group)


def _end_with(parent: int, _worker: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def readers(workers: int) -> dict:
    """DataLoader's arguments for so many readers, which leave signals to this process.

    They end when it ends, and are forked, so that it is their parent.
    """
    if workers == 0:
        return {"num_workers": 0}
    init = partial(_end_with, os.getpid())
    return {"num_workers": workers, "worker_init_fn": init, "multiprocessing_context": "fork"}
