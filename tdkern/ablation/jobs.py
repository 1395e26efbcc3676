"""Jobs in processes of their own, several at a time; one that fails or dies harms no other."""

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..data.files import brief

TRIES = 2  # of a job whose process is killed
IMPORTED = "tdkern.ablation.training"  # what jobs need
EVERY = 0.5  # seconds between two words of a job


class Job(NamedTuple):
    """Work for one process.

    Attributes:
        name: for messages.
        work: `work(*arguments, tell)`, a function of a module, where tell is given the share that
            is done.
        arguments: what it is given, which is pickled.
        size: how much work it is, in any unit.
    """

    name: str
    work: Callable[..., Any]
    arguments: tuple
    size: float = 1.0


@dataclass
class Worker:
    """A process, our end of its pipe, and what it does."""

    process: Any
    connection: Connection
    job: Job | None = None
    share: float = 0.0


def run_jobs(
    jobs: Iterable[Job],
    workers: int,
    done: Callable[[Job, Any], None],
    failed: Callable[[Job, str], None],
    title: str = "",
) -> None:
    """Run jobs, in order and so many at a time, with one display of progress.

    A worker does job after job, so that what they have in common is made once. One that is killed
    is replaced, and its job is done again, TRIES times in all.

    Args:
        jobs: the jobs.
        workers: processes, each of one thread.
        done: is given a job and its result, in this process, as soon as it is there.
        failed: is given a job and one line that says why there is no result.
        title: stands before the progress.
    """
    pool = _Pool(list(jobs), workers, done, failed, title)
    try:
        pool.run()
    finally:
        pool.close()


class _Pool:
    def __init__(self, jobs: list[Job], workers: int, done, failed, title: str):
        self.waiting, self.done, self.failed = deque(jobs), done, failed
        self.workers: list[Worker] = []
        self.most = min(workers, len(jobs))
        self.kills, self.counts = Counter(), Counter()
        self.finished, self.total = 0.0, sum(job.size for job in jobs)
        self.bar = tqdm(
            desc=title,
            total=100.0,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            mininterval=0.1 if sys.stderr and sys.stderr.isatty() else 30,  # seconds
            disable=not jobs,
        )

    def run(self) -> None:
        while self.waiting or any(worker.job for worker in self.workers):
            while self.waiting and len(self.workers) < self.most:
                self.workers.append(_started())
            for worker in self.workers:
                if worker.job is None and self.waiting:
                    self._give(worker)
            for connection in wait([worker.connection for worker in self.workers], timeout=EVERY):
                (worker,) = (each for each in self.workers if each.connection is connection)
                self._listen(worker)
            self._show()

    def _give(self, worker: Worker) -> None:
        worker.job, worker.share = self.waiting.popleft(), 0.0
        try:
            worker.connection.send(worker.job)
        except OSError:  # it died meanwhile
            self._lost(worker)

    def _listen(self, worker: Worker) -> None:
        """Take what a worker says: the share that is done, a result, an error, or nothing more."""
        try:
            word, value = worker.connection.recv()
        except (EOFError, OSError):
            self._lost(worker)
            return
        if word == "share":
            worker.share = value
            return
        job, worker.job = worker.job, None
        assert job is not None  # a worker says nothing unasked
        self._end(job, word, value)

    def _lost(self, worker: Worker) -> None:
        """A worker's process is dead."""
        self.workers.remove(worker)
        worker.connection.close()
        worker.process.join()
        job = worker.job
        if job is None:
            return
        self.kills[job.name] += 1
        if self.kills[job.name] < TRIES:
            self.waiting.appendleft(job)
            return
        self._end(job, "failed", f"its process ended with exit code {worker.process.exitcode}")

    def _end(self, job: Job, word: str, value) -> None:
        self.finished += job.size
        self.counts[word] += 1
        report = self.done if word == "done" else self.failed
        report(job, value)

    def _show(self) -> None:
        busy = [(worker.job, worker.share) for worker in self.workers if worker.job]
        part = sum(share * job.size for job, share in busy)
        share = 100 * (self.finished + part) / self.total
        counts = f"{self.counts['done']} done, {len(busy)} running, {len(self.waiting)} waiting"
        if self.counts["failed"]:
            counts += f", {self.counts['failed']} failed"
        self.bar.set_postfix_str(counts, refresh=False)
        self.bar.update(share - self.bar.n)

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
        self.bar.close()


def _started() -> Worker:
    # workers are forks of a process that has only imported: each begins at once, and none has locks
    # that a thread of this process held
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([IMPORTED])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def _serve(connection: Connection) -> None:
    """In a process of its own: job after job, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both: the other decides
    torch.set_num_threads(1)
    last = 0.0

    def tell(share: float) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            _say(connection, "share", share)

    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        try:
            word, value = "done", job.work(*job.arguments, tell)
        except Exception as error:
            word, value = "failed", brief(error)
        _say(connection, word, value)


def _say(connection: Connection, word: str, value) -> None:
    try:
        connection.send((word, value))
    except OSError:  # nobody listens any more
        os._exit(1)
