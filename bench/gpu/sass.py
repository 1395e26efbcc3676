"""Every CUDA kernel on paper, from the machine code: python bench/gpu/sass.py [libtdkern_cuda.so].
Needs no GPU.

First what a multiprocessor holds of each kernel, how wide its loads and stores are, and where its
threads may part; then what a round of noise_pair's packed kernels costs. A round is four elements
of a thread under the "markov" coupling; what surrounds it is paid once a task.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ROOT = Path(__file__).resolve().parents[2]
THREADS = 256  # of a block, in every kernel (csrc/cuda/launch.cuh)
REGISTERS, RESIDENT = 65536, 2048  # of a multiprocessor, from 8.0 to 10.0; threads
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


class Line(NamedTuple):
    """An instruction."""

    at: int
    op: str
    target: int | None  # of a branch


class Paper(NamedTuple):
    """What the machine code says of a kernel."""

    registers: int
    spilled: int  # bytes of a thread's stack and local memory
    loads: Counter  # {bits: instructions} from global memory
    stores: Counter
    partings: int  # places in a loop that loads where threads may part and meet again

    @property
    def blocks(self) -> int:
        """How many blocks a multiprocessor holds: no kernel has shared memory for it to matter."""
        in_eights = -(-self.registers // 8) * 8
        return min(REGISTERS // (in_eights * THREADS), RESIDENT // THREADS)

    @property
    def occupancy(self) -> float:
        return self.blocks * THREADS / RESIDENT


def kernels(library: Path, arch: str) -> dict[str, str]:
    """{mangled name: machine code} of every kernel for sm_<arch>."""
    text = dumped(library, "--dump-sass", "-arch", f"sm_{arch}")
    return dict(part.split("\n", 1) for part in text.split("Function : ")[1:])


def dumped(library: Path, *words: str) -> str:
    return subprocess.run(
        [TOOL, *words, library], capture_output=True, text=True, check=True
    ).stdout


def lines_of(text: str) -> list[Line]:
    return [
        Line(int(at, 16), op, int(target, 16) if target else None)
        for at, op, target in re.findall(LINE, text)
    ]


def loops_of(lines: list[Line]) -> list[list[Line]]:
    """What each branch backwards repeats."""
    return [
        [line for line in lines if branch.target <= line.at <= branch.at]
        for branch in lines
        if branch.op.startswith("BRA") and branch.target and branch.target < branch.at
    ]


# ---- every kernel ----------------------------------------------------------------------------


def papers(library: Path, arch: str) -> dict[str, Paper]:
    """{name, mangled: what its machine code says} of every kernel for sm_<arch>."""
    usage = dumped(library, "--dump-resource-usage", "-arch", f"sm_{arch}")
    resources = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", usage)
    code = kernels(library, arch)
    found = {}
    for name, registers, stack, local in resources:
        lines = lines_of(code[name])
        found[name] = Paper(
            registers=int(registers),
            spilled=int(stack) + int(local),
            loads=widths(lines, "LDG"),
            stores=widths(lines, "STG"),
            partings=partings(lines),
        )
    return found


def widths(lines: list[Line], op: str) -> Counter:
    """{bits: instructions} of the loads or stores."""
    found = (re.fullmatch(rf"{op}\.E(?:\.U?S?(8|16|64|128))?\b.*", line.op) for line in lines)
    return Counter(int(match[1] or 32) for match in found if match)


def partings(lines: list[Line]) -> int:
    """In the innermost loops that load: the largest number."""
    loops = [loop for loop in loops_of(lines) if widths(loop, "LDG")]
    inner = [loop for loop in loops if not any(set(other) < set(loop) for other in loops)]
    return max((sum(line.op == "BSSY" for line in loop) for loop in inner), default=0)


def readable(names: list[str]) -> list[str]:
    """Mangled names as C++ has them, without arguments."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    text = re.sub(r"\(anonymous namespace\)::|tdkern::|void |__nv_|__", "", text)
    return [re.sub(r"\(.*", "", name) for name in text.replace("(Norm)", "").splitlines()]


def print_papers(library: Path, arch: str) -> None:
    found = papers(library, arch)
    print(f"| sm_{arch} | registers | blocks | occupancy | spilled | loads | stores | partings |")
    print("| --- | ---: | ---: | ---: | ---: | --- | --- | ---: |")
    rows = zip(readable(list(found)), found.values(), strict=True)
    for name, paper in sorted(rows):
        loads, stores = (
            ", ".join(f"{count} of {bits}" for bits, count in sorted(each.items(), reverse=True))
            for each in (paper.loads, paper.stores)
        )
        print(
            f"| `{name}` | {paper.registers} | {paper.blocks} | {paper.occupancy:.0%} | "
            f"{paper.spilled} | {loads} | {stores} | {paper.partings} |"
        )


# ---- noise_pair ------------------------------------------------------------------------------


def pair_rounds(code: dict[str, str]) -> dict[str, list[str]]:
    """{storage type, mangled: the instructions of a round}: the shortest loop with the draws in
    it."""
    rounds = {}
    for name, text in code.items():
        found = re.search(r"pair_kernelILb1ELb0E(\w+?)EEv", name)
        if not found:
            continue
        loop = min(
            (
                loop
                for loop in loops_of(lines_of(text))
                if sum(line.op.startswith("IMAD.WIDE") for line in loop) > 30
            ),
            key=len,
        )
        rounds[found[1]] = [line.op for line in loop]
    return rounds


def print_rounds(library: Path, arch: str) -> None:
    for types, ops in pair_rounds(kernels(library, arch)).items():
        counts = Counter(
            next(name for name, pattern in CLASSES.items() if re.match(pattern, op)) for op in ops
        )
        print(
            f"sm_{arch} {types:20} {len(ops)} ({len(ops) / 4:.1f} an element):",
            ", ".join(f"{counts[name]} {name}" for name in CLASSES),
        )


if __name__ == "__main__":
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tdkern/lib/libtdkern_cuda.so"
    archs = dict.fromkeys(re.findall(r"sm_(\d+)", dumped(library, "--list-elf")))
    for arch in archs:
        print_papers(library, arch)
        print()
    for arch in archs:
        print_rounds(library, arch)
