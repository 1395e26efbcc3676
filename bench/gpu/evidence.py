"""EDM, TD+EDM and windowed TD on CIFAR-10: what fits into one lease of a GPU, lease after lease.

    bench/gpu/evidence.sh [--dry] [--seconds S] [--from FOLDER] OUT

It builds the library as campaign.py does, then trains a small SongUNet (trials.py) seed after seed,
in bfloat16, compiled, each step one CUDA graph. OUT gets

    results.jsonl   a line for each seed, method and number of sampling steps that is scored
    plan.json       how long each method trains: what the first lease found to fit, for all leases
    state/          of the run that the end of the time cut off, for the next lease to go on with
    log.txt         what the build printed

FOLDER (carried/ in the repository, which git ignores) has the images, packed by packing.py,
detector.safetensors of `tdkern detector train`, and what earlier leases left in OUT: after each
`rm -rf carried/state; cp -rf OUT/. carried/`, and name carried/ in `carry`.
bench/results/evidence/gpu.jsonl keeps results.jsonl; `make report` shows it. --dry needs no GPU: it
builds nothing and trains a tiny network for a few steps.
"""

import argparse
import shutil
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import campaign

SECONDS = 530  # of nine minutes: what runs over is the last state's writing
KEPT = ("results.jsonl", "plan.json", "state")


def bring(folder: Path, out: Path) -> None:
    """Copy what earlier leases left, unless OUT goes on with something already."""
    if any((out / name).exists() for name in KEPT):
        return
    for name in KEPT:
        source = folder / name
        if source.is_dir():
            shutil.copytree(source, out / name, copy_function=shutil.copyfile)
        elif source.exists():
            shutil.copyfile(source, out / name)


def about() -> dict:
    """What every line of the results says of the machine."""
    facts = campaign.machine()
    kept = {name: facts.get(name) for name in ("device", "torch", "commit")}
    return kept | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry", action="store_true", help="without a GPU: the plumbing, at a tiny size"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument(
        "--from",
        dest="folder",
        type=Path,
        default=campaign.ROOT / "carried",
        help="the images, and what earlier leases left",
    )
    parser.add_argument("out", type=Path, help="a folder for the results")
    args = parser.parse_args(arguments)
    ends = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    bring(args.folder, args.out)
    if not args.dry:
        built = campaign.run_stage("build", campaign.Campaign(args.out.resolve(), False, ends))
        if not built["ok"]:
            print(built.get("tail", ""))
            return 1
    sys.path.insert(0, str(campaign.ROOT))
    import trials  # which imports what was just built

    scale = trials.TINY if args.dry else trials.Scale()
    trials.run(trials.Lease(args.out, ends, scale, about()), args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
