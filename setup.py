"""Runs CMake (CMakeLists.txt describes the build) for `pip install`.

Environment: TDKERN_CUDA=1 makes a missing nvcc an error, =0 leaves CUDA out, and then nothing of
CUDA is looked at; TDKERN_CPP=0 installs Python alone; TORCH_CUDA_ARCH_LIST, CUDA_HOME, CUDACXX and
MAX_JOBS as everywhere in PyTorch.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
COMPILED = os.environ.get("TDKERN_CPP") != "0"
WITHOUT_CUDA = "or build without CUDA: TDKERN_CUDA=0"
# The names that torch.utils.cpp_extension takes in TORCH_CUDA_ARCH_LIST.
ARCHITECTURES = {
    "Kepler": "3.5+PTX",
    "Kepler+Tegra": "3.7",
    "Maxwell": "5.0;5.2+PTX",
    "Maxwell+Tegra": "5.3",
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")  # as far as nvcc knows them; of the last, PTX too


def fail(message: str) -> None:
    sys.exit(f"tdkern: {message}")


def torch_package() -> Path:
    try:
        import torch
    except ImportError:
        fail(
            "building needs torch, which is not installed here: `pip install torch`, then `pip "
            "install --no-build-isolation .`"
        )
    return Path(torch.__file__).parent


# ---- CUDA: nothing of this runs where TDKERN_CUDA=0


def find_nvcc() -> str | None:
    """The nvcc of CUDACXX, else of CUDA_HOME, else of PATH."""
    named = os.environ.get("CUDACXX")
    if named:
        return shutil.which(named) or fail(
            f"CUDACXX is {named!r}, where no nvcc is: set it to one, unset it, {WITHOUT_CUDA}"
        )
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = shutil.which("nvcc", path=str(Path(home) / "bin"))
        return nvcc or fail(
            f"CUDA_HOME is {home!r}, which has no bin/nvcc: set it to a CUDA toolkit, unset it, "
            f"{WITHOUT_CUDA}"
        )
    return shutil.which("nvcc")


def check_version(nvcc: str) -> None:
    """Refuse, before anything is compiled, an nvcc of another major version than torch's CUDA."""
    import torch

    found = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if found is None:
        fail(
            f"{nvcc} --version names no CUDA release: put an nvcc first on PATH, set CUDA_HOME, "
            f"{WITHOUT_CUDA}"
        )
    if torch.version.cuda and found[1] != torch.version.cuda.split(".")[0]:
        fail(
            f"nvcc is CUDA {found[1]}.{found[2]}, torch was built with CUDA {torch.version.cuda}: "
            f"put an nvcc {torch.version.cuda} first "
            f"on PATH (or set CUDA_HOME or CUDACXX), install a torch for CUDA {found[1]}, "
            f"{WITHOUT_CUDA}"
        )


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def architectures(nvcc: str) -> str:
    """TORCH_CUDA_ARCH_LIST in numbers: entries like 9.0a or 10.0+PTX between semicolons."""
    known = set(re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch")))
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; \t\n")
    if not given:
        return (
            ";".join(entry for entry in DEFAULT_ARCHITECTURES if entry.replace(".", "") in known)
            + "+PTX"
        )
    entries = []
    for name in re.split(r"[\s;]+", given):
        numbers = native_architectures() if name == "native" else ARCHITECTURES.get(name, name)
        entries += [number for number in numbers.split(";") if number not in entries]
    for entry in entries:
        number = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if number is None:
            names = ", ".join(ARCHITECTURES)
            fail(
                f"TORCH_CUDA_ARCH_LIST is {given!r}, but {entry!r} is none of 8.0, 9.0a, 10.0+PTX "
                f"and their like, native, {names}"
            )
        if number[1] + number[2] not in known:
            fail(
                f"TORCH_CUDA_ARCH_LIST is {given!r}, but {nvcc} does not build for {entry}: take "
                "it out, or set CUDA_HOME to another toolkit"
            )
    return ";".join(entries)


def native_architectures() -> str:
    """Those of the GPUs that are here."""
    import torch

    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if not found:
        fail(
            "TORCH_CUDA_ARCH_LIST is native, but torch sees no GPU here: name an architecture, "
            "such as 9.0, " + WITHOUT_CUDA
        )
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def cuda_options() -> list[str]:
    wanted = os.environ.get("TDKERN_CUDA", "")
    if wanted not in ("", "0", "1"):
        fail(f"TDKERN_CUDA must be 0, 1 or unset, got {wanted!r}")
    nvcc = None if wanted == "0" else find_nvcc()
    if nvcc is None:
        if wanted == "1":
            fail(
                "TDKERN_CUDA=1, but nvcc was not found: put it on PATH, or set CUDA_HOME or CUDACXX"
            )
        return ["-DTDKERN_CUDA=OFF"]
    check_version(nvcc)
    return [
        "-DTDKERN_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DTDKERN_CUDA_ARCHS={architectures(nvcc)}",
    ]


# ---- commands


def remove_built(package: Path) -> None:
    """Remove what an earlier build left in a package: a process that has it mapped keeps it."""
    for old in (*package.glob("_C*.so"), *package.glob("lib/*.so")):
        old.unlink()
    shutil.rmtree(package / "lib", ignore_errors=True)


class Build(build):
    """Into an empty folder: a wheel holds what this build made."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildPython(build_py):
    def run(self):
        super().run()
        if self.editable_mode and not COMPILED:
            remove_built(ROOT / "tdkern")


class CMakeBuild(build_ext):
    def run(self):
        # the CUDA kernels for the host serve the tests of a checkout
        self.targets = ["all", "tdkern_host"] if self.inplace else ["all"]
        if self.inplace and not COMPILED:
            remove_built(ROOT / "tdkern")
        super().run()

    def build_extension(self, ext):
        import pybind11

        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DTDKERN_TORCH={torch_package()}",
            *cuda_options(),
            f"-DTDKERN_PACKAGE={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        for command in (
            configure,
            ["cmake", "--build", str(build), "--target", *self.targets, *jobs],
        ):
            if subprocess.run(command).returncode:
                fail(
                    f"`{command[0]} {command[1]}` failed, see above; TDKERN_CPP=0 installs the "
                    "Python part alone"
                )
        if "-DTDKERN_CUDA=OFF" in configure:  # what an earlier build in place had is not to be used
            (package / "lib/libtdkern_cuda.so").unlink(missing_ok=True)
            shutil.rmtree(package / "lib/ptxas", ignore_errors=True)
        shutil.copyfile(build / "compile_commands.json", ROOT / "compile_commands.json")

    def copy_extensions_to_source(self):
        """An editable install: the op libraries too, each renamed into place, since a running
        process may have the old one mapped."""
        built, source = Path(self.build_lib) / "tdkern", ROOT / "tdkern"
        remove_built(source)
        for file in (
            file for file in built.rglob("*") if file.is_file() and file.suffix in (".so", ".txt")
        ):
            target = source / file.relative_to(built)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, f"{target}.new")
            os.replace(f"{target}.new", target)


setup(
    ext_modules=[Extension("tdkern._C", sources=[])] if COMPILED else [],
    cmdclass={"build": Build, "build_py": BuildPython, "build_ext": CMakeBuild},
)
