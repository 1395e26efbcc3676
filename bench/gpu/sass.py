"""What a round of noise_pair's packed kernels costs, from the machine code: python
bench/gpu/sass.py [libtdkern_cuda.so]. Needs no GPU.

A round is four elements of a thread under the "markov" coupling; what surrounds it is paid once a
task.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import triton

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ROOT = Path(__file__).resolve().parents[2]
CLASSES = {
    "multiply 32 to 64": r"IMAD\.(WIDE|HI)",
    "float32": "FFMA|FMUL|FADD",
    "FSEL": "FSEL",
    "LOP3": "LOP3",
    "integer": "IMAD|IADD|VIADD|LEA|SHF|ISETP|SEL|PRMT",
    "conversion": "I2F|F2F",
    "MUFU": "MUFU",
    "memory": "LDG|STG|LDS",
    "other": "",
}
# address, operation, where a branch goes
LINE = r"/\*(\w{4,5})\*/ +(?:@\S+ +)?([A-Z]\S*)(?: (?:\S+, )?0x(\w+) ;)?"


def kernels(library: Path, arch: str) -> dict[str, str]:
    """{mangled name: machine code} of every kernel for sm_<arch>."""
    text = subprocess.run(
        [TOOL, "--dump-sass", "-arch", f"sm_{arch}", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return dict(part.split("\n", 1) for part in text.split("Function : ")[1:])


def pair_rounds(code: dict[str, str]) -> dict[str, list[str]]:
    """{storage type, mangled: the instructions of a round}: the shortest loop with the draws in
    it."""
    rounds = {}
    for name, text in code.items():
        found = re.search(r"pair_kernelILb1ELb0E(\w+?)EEv", name)
        if not found:
            continue
        lines = [
            (int(at, 16), op, target and int(target, 16))
            for at, op, target in re.findall(LINE, text)
        ]
        loops = [
            [line for line in lines if target <= line[0] <= at]
            for at, op, target in lines
            if op.startswith("BRA") and target and target < at
        ]
        loop = min(
            (loop for loop in loops if sum(op.startswith("IMAD.WIDE") for _, op, _ in loop) > 30),
            key=len,
        )
        rounds[found[1]] = [op for _, op, _ in loop]
    return rounds


if __name__ == "__main__":
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tdkern/lib/libtdkern_cuda.so"
    images = subprocess.run(
        [TOOL, "--list-elf", library], capture_output=True, text=True, check=True
    ).stdout
    for arch in dict.fromkeys(re.findall(r"sm_(\d+)", images)):
        for types, ops in pair_rounds(kernels(library, arch)).items():
            counts = Counter(
                next(name for name, pattern in CLASSES.items() if re.match(pattern, op))
                for op in ops
            )
            print(
                f"sm_{arch} {types:20} {len(ops)} ({len(ops) / 4:.1f} an element):",
                ", ".join(f"{counts[name]} {name}" for name in CLASSES),
            )
