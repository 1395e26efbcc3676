"""Kills, signals and power cuts of real runs: is what comes out the same, bit for bit?

    PYTHONPATH=.:tests python bench/reliability/kills.py bench/results/reliability.json \\
        [--kills 50] [--part NAME ...]

Each part starts runs of twelve steps, ends them in its way at random moments, half of them in the
middle of writing, goes on with what is left, and compares what comes of it with a run in one go.
The parts: edm, ct, ddpm (each with 0 and 2 readers), processes (two), signals, torchrun, power. For
the last a file system in a file is cut off: it needs root and a loop device, and is left out
without.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from helpers.runs import checkpoints_are_whole, contents, resume, run_child, train_or_die
from helpers.tiny import TINY, children, data_set, flags, pixels, quick_pictures
from tdkern.training import Options, Trainer, checkpoint, train
from tdkern.training.checkpoint import STATE
from tdkern.training.distributed import joined
from tdkern.training.formats import as_json

FAMILIES = {"edm": {}, "ct": {"family": "ct"}, "ddpm": {"family": "ddpm"}}
CALLS = {"fsync": 40, "replace": 12, "rename": 8, "save_file": 4, "unlink": 6, "rmdir": 3}
STEPS = 12


def options_of(data: Path, **changes) -> Options:
    return Options(data=str(data), duration=8e-6 * STEPS, **TINY | changes)


def differing(ours: dict, theirs: dict) -> list[str]:
    return sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )


def kills(
    root: Path, data: Path, choose: random.Random, count: int, workers: int, **changes
) -> dict:
    """Kills of one process."""
    options = options_of(data, workers=workers, **changes)
    began = time.monotonic()
    run_child(root / "straight", options)
    seconds = time.monotonic() - began
    expected = contents(root / "straight")
    killed, runs, different = 0, 0, []
    while killed < count:
        run_dir = root / f"run{runs}"
        plan = {"after": choose.uniform(0.1, 1) * seconds}
        if choose.random() < 0.5:
            name = choose.choice(list(CALLS))
            plan = {"kill": (name, choose.randrange(CALLS[name]))}
        if run_child(run_dir, options, **plan):
            killed += 1
            checkpoints_are_whole(run_dir) if run_dir.exists() else None
            continue
        different += differing(contents(run_dir), expected)
        different += [path.name for path in run_dir.glob(".*")]
        shutil.rmtree(run_dir)
        runs += 1
    run_child(root / f"run{runs}", options)
    different += differing(contents(root / f"run{runs}"), expected)
    return {
        "kills": killed,
        "finished runs": runs + 1,
        "files that differ": different,
    }


def _rank(rank: int, port: int, run_dir: Path, options: Options) -> None:
    names = {
        "RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update(
        {name: str(value) for name, value in names.items()} | {"OMP_NUM_THREADS": "1"}
    )
    torch.set_num_threads(1)
    quick_pictures()
    sys.stderr = open(os.devnull, "w")
    tqdm.set_lock(threading.RLock())
    states = checkpoint.checkpoints(run_dir, STATE) if run_dir.exists() else []
    try:
        with joined() as process:
            if rank == 0:
                run_dir.mkdir(exist_ok=True)
            train(
                Trainer(options, process, states[-1] if states else None),
                run_dir if rank == 0 else None,
            )
    except Exception:
        os._exit(3)


def _images_saved(run_dir: Path) -> int:
    """Of the newest state, which another process may just be replacing."""
    numbers = [checkpoint.images_of(path) for path in run_dir.glob(f"{STATE}-*")]
    return max((number for number in numbers if number is not None), default=0)


def processes(root: Path, data: Path, choose: random.Random, count: int) -> dict:
    """Kills of one of two processes, or of both, at a random step and a little later."""
    options = options_of(data, gpus=2)
    port = [choose.randrange(20000, 30000)]

    def run(run_dir: Path, kill: bool) -> bool:
        port[0] += 1
        place = (port[0], run_dir, options)
        ranks = [children.Process(target=_rank, args=(rank, *place)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        wanted = 8 * choose.randrange(_images_saved(run_dir) // 8, STEPS) if kill else 10**9
        while all(rank.is_alive() for rank in ranks) and _images_saved(run_dir) < wanted:
            time.sleep(0.01)
        time.sleep(choose.uniform(0, 0.3))
        for rank in choose.choice([ranks[:1], ranks[1:], ranks]) if kill else ():
            rank.kill()
        for rank in ranks:
            rank.join(400)
            assert rank.exitcode is not None, "a rank hangs"
        return any(rank.exitcode for rank in ranks)

    assert not run(root / "straight", False)
    expected, killed, runs, different = contents(root / "straight"), 0, 0, []
    while killed < count:
        if run(root / f"run{runs}", True):
            killed += 1
            continue
        different += differing(contents(root / f"run{runs}"), expected)
        runs += 1
    assert not run(root / f"run{runs}", False)
    different += differing(contents(root / f"run{runs}"), expected)
    return {"kills": killed, "finished runs": runs + 1, "files that differ": different}


def _counting(run_dir: Path, path: Path, wanted: int, signum: int) -> None:
    """A run from the command line that gets a signal in a step, and says how many steps it took."""
    from tdkern.cli import main

    torch.set_num_threads(1)
    quick_pictures()
    real = Trainer.train_step

    def train_step(self, *args):
        if self.step == wanted:
            threading.Timer(random.uniform(0, 0.1), os.kill, (os.getpid(), signum)).start()
            time.sleep(0.2)
        real(self, *args)
        path.write_text(str(self.step))

    Trainer.train_step = train_step
    with open(os.devnull, "w") as sys.stdout:
        sys.stderr = sys.stdout
        main(["train", "--resume", str(run_dir)], prog_name="tdkern")


def signals(root: Path, data: Path, choose: random.Random, count: int) -> dict:
    """Signals between two dumps: the steps that the saved state lacks."""
    changes = {"tick": 0.04, "dump": 0, "snap": 0}
    options = options_of(data, **changes)
    run_child(root / "straight", options)
    expected = contents(root / "straight")
    lost, codes, different = 0, 0, []
    for i in range(count):
        run_dir, steps = root / f"run{i}", root / f"steps{i}"
        run_dir.mkdir()
        text = json.dumps(as_json(options) | {"workers": choose.choice([0, 2])})
        (run_dir / "training_options.json").write_text(text)
        signum = choose.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
        args = (run_dir, steps, choose.randrange(STEPS - 1), signum)
        process = children.Process(target=_counting, args=args)
        process.start()
        process.join(300)
        if process.exitcode == 128 + signum:
            codes += 1
        saved = checkpoint.read_meta(checkpoint.find(run_dir, STATE), STATE)["step"]
        lost += int(steps.read_text()) - saved
        resume(run_dir, workers=0)
        different += differing(contents(run_dir), expected)
    return {
        "signals": count,
        "steps lost": lost,
        "exit codes right": codes,
        "files that differ": different,
    }


def torchrun(root: Path, data: Path, choose: random.Random, count: int) -> dict:
    """Kills of torchrun itself: its ranks save their state and end."""
    seconds, saved = [], 0
    for i in range(count):
        run_dir = root / f"run{i}"
        options = TINY | {"tick": 0.8, "dump": 0, "snap": 0}
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "-m",
            "tdkern.cli",
        ]
        command += [
            "train",
            "--data",
            str(data),
            "--outdir",
            str(run_dir),
            "--nosubdirs",
            "--duration",
            "0.08",
            *flags(options),
        ]
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        while not (run_dir / "stats.jsonl").exists():
            time.sleep(0.1)
        owner = json.loads((run_dir / "run.lock").read_text())["pid"]
        process.kill()
        process.wait()
        began = time.monotonic()
        while Path(f"/proc/{owner}").exists() and time.monotonic() < began + 60:
            time.sleep(0.05)
        seconds.append(round(time.monotonic() - began, 2))
        saved += len(checkpoint.checkpoints(run_dir, STATE))
    return {
        "kills": count,
        "most seconds until the ranks ended": max(seconds),
        "states saved": saved,
    }


def power(root: Path, data: Path, choose: random.Random, count: int) -> dict:
    """Power cuts: what had reached the disk of a file system at a random moment."""
    options = options_of(data)
    run_child(root / "straight", options)
    expected, cuts, different, states, image = contents(root / "straight"), 0, [], 0, root / "disk"
    for i in range(count):
        disk, copy = root / f"mount{i}", root / f"after{i}"
        disk.mkdir()
        copy.mkdir()
        subprocess.run(["truncate", "-s", "64M", image], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        if subprocess.run(
            ["mount", "-o", "loop", image, disk], stderr=subprocess.DEVNULL
        ).returncode:
            return {"left out": "no loop device may be mounted here"}
        process = children.Process(target=train_or_die, args=(disk / "run", options, None))
        process.start()
        wanted = 8 * choose.randrange(1, STEPS)
        while process.is_alive() and _images_saved(disk / "run") < wanted:
            time.sleep(0.01)
        process.join(choose.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGSTOP) if process.is_alive() else None
        shutil.copy(image, root / "cut")  # without what the file system still holds in memory
        process.kill()
        process.join()
        subprocess.run(["umount", disk], check=True)
        subprocess.run(["mount", "-o", "loop", root / "cut", copy], check=True)
        run_dir = copy / "run"
        if (run_dir / "training_options.json").exists():
            checkpoints_are_whole(run_dir)
            states += bool(checkpoint.checkpoints(run_dir, STATE))
            assert not run_child(run_dir, options)
            different += differing(contents(run_dir), expected)
        cuts += 1
        subprocess.run(["umount", copy], check=True)
    return {"power cuts": cuts, "with a state on the disk": states, "files that differ": different}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--part", nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quick_pictures()
    few = max(args.kills * 2 // 5, 1)
    parts = {
        f"{name}, {workers} readers": (kills, args.kills, {"workers": workers, **changes})
        for name, changes in FAMILIES.items()
        for workers in (0, 2)
    }
    parts |= {
        "processes": (processes, few, {}),
        "signals": (signals, few, {}),
        "torchrun": (torchrun, max(few // 5, 1), {}),
        "power": (power, few, {}),
    }
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name, (work, count, changes) in parts.items():
        if args.part and not any(name.startswith(part) for part in args.part):
            continue
        with tempfile.TemporaryDirectory() as folder:
            data = data_set(Path(folder) / "images.zip", pixels(10), [i % 3 for i in range(10)])
            began = time.monotonic()
            results[name] = work(Path(folder), data, random.Random(args.seed), count, **changes)
            results[name]["seconds"] = round(time.monotonic() - began)
        print(name, results[name], flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
