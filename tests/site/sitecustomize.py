"""Put on PYTHONPATH by test_rehearsal.py: every Python process of a campaign runs it as it starts.

TDKERN_IMPORTS: a file to which each process writes, in lines of JSON, which of the repository's
    files it loaded, and what they asked for that a GPU machine does not have, which is refused.
TDKERN_INJECT: FAILURE:SCRIPT, one of the functions below, for the process that runs the script.
"""

import atexit
import json
import os
import sys
from importlib.machinery import PathFinder

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# What a GPU machine has; the standard library less what Python 3.12 no longer has.
PACKAGES = {
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "scipy",
    "hypothesis",
    "pytest",
    "pytest_benchmark",
    "xdist",
    "tqdm",
    "safetensors",
    "PIL",
    "matplotlib",
    "tensorboard",
    "cmake",
    "ninja",
    "pybind11",
    "setuptools",
}
STANDARD = sys.stdlib_module_names - {"asynchat", "asyncore", "distutils", "imp", "smtpd"}
GO_BETWEENS = ("<frozen", os.path.join("importlib", ""), os.path.join("_pytest", "outcomes.py"))


def is_ours(file: str | None) -> bool:
    """Whether a file is the repository's, or the code of a `python -c`."""
    inside = str(file).startswith(ROOT + os.sep) and "site-packages" not in str(file)
    return file == "<string>" or inside


class Refuse:
    """Finds nothing; refuses what one of our files asks for and a GPU machine lacks."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        top = name.partition(".")[0]
        if top in PACKAGES or top in STANDARD or not is_ours(asker := asking()):
            return None
        spec = PathFinder.find_spec(top)
        if spec and any(map(is_ours, [spec.origin, *(spec.submodule_search_locations or [])])):
            return None
        log({"refused": name, "to": asker})
        raise ModuleNotFoundError(f"No module named {name!r}: refused", name=name)


def asking() -> str:
    """The file whose code imports."""
    frame = sys._getframe(2)
    while frame.f_back and any(each in frame.f_code.co_filename for each in GO_BETWEENS):
        frame = frame.f_back
    return frame.f_code.co_filename


def log(facts: dict) -> None:
    with open(os.environ["TDKERN_IMPORTS"], "a") as file:
        file.write(json.dumps(facts) + "\n")


def log_files() -> None:
    files = {str(getattr(module, "__file__", "")) for module in list(sys.modules.values())}
    files.add(os.path.abspath(sys.argv[0]))  # a script that has ended has no __file__ any more
    log({"files": sorted(file for file in files if is_ours(file))})


# ---- failures -----------------------------------------------------------------------------------


def launch() -> None:
    """A kernel that fails to launch."""
    from tdkern.ops import _backends

    def fails(*args):
        raise RuntimeError("CUDA error: invalid configuration argument")

    _backends.call = fails


def memory() -> None:
    """A step and a benchmark for which there is no memory."""
    import torch

    import tdkern
    import tdkern.losses

    def fails(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")

    tdkern.losses.EDMLoss = tdkern.td_loss = fails


def hang() -> None:
    """Deaf to an interrupt, as what waits for a GPU is; so is a process that it started, and both
    hold the lock on the file TDKERN_LOCK."""
    import fcntl
    import signal
    import subprocess
    import time

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(os.environ["TDKERN_LOCK"], "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.Popen(["sleep", "600"], pass_fds=[lock.fileno()])
        print("waiting", flush=True)
        time.sleep(600)


if "TDKERN_IMPORTS" in os.environ:
    sys.meta_path.insert(0, Refuse)
    atexit.register(log_files)
if "TDKERN_INJECT" in os.environ:
    failure, _, script = os.environ["TDKERN_INJECT"].partition(":")
    if script in sys.orig_argv:
        {"launch": launch, "memory": memory, "hang": hang}[failure]()
