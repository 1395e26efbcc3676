"""Runs CMake (CMakeLists.txt describes the build) for `pip install`.

Environment: TDKERN_CUDA=1 makes a missing nvcc an error, =0 leaves CUDA out; TDKERN_CPP=0 installs Python alone;
TORCH_CUDA_ARCH_LIST and MAX_JOBS as everywhere in PyTorch.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_package() -> Path:
    try:
        import torch
    except ImportError:
        sys.exit("tdkern: building needs torch, which is not installed here: `pip install torch`, "
                 "then `pip install --no-build-isolation .`")
    check_cuda(torch.version.cuda)
    return Path(torch.__file__).parent


def check_cuda(torch_cuda: str | None) -> None:
    """Refuse, before anything is compiled, an nvcc of another major version than torch's CUDA."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if os.environ.get("TDKERN_CUDA") == "0" or not nvcc or not torch_cuda:
        return
    found = re.search(r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if found and found[1] != torch_cuda.split(".")[0]:
        sys.exit(f"tdkern: nvcc is CUDA {found[1]}.{found[2]}, torch was built with CUDA {torch_cuda}: put an nvcc {torch_cuda} first on PATH "
                 f"(or set CUDACXX), install a torch for CUDA {found[1]}, or build without CUDA: TDKERN_CUDA=0")


class CMakeBuild(build_ext):
    def run(self):
        self.targets = ["all", "tdkern_host"] if self.inplace else ["all"]  # the CUDA kernels for the host serve the tests of a checkout
        super().run()

    def build_extension(self, ext):
        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve()
        cuda = {"1": "ON", "0": "OFF"}.get(os.environ.get("TDKERN_CUDA", ""), "AUTO")
        import pybind11

        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DTDKERN_TORCH={torch_package()}", f"-DTDKERN_CUDA={cuda}", f"-DTDKERN_PACKAGE={package}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        for command in (configure, ["cmake", "--build", str(build), "--target", *self.targets, *jobs]):
            if subprocess.run(command).returncode:
                sys.exit(f"tdkern: `{command[0]} {command[1]}` failed, see above; TDKERN_CPP=0 installs the Python part alone")
        shutil.copyfile(build / "compile_commands.json", ROOT / "compile_commands.json")

    def copy_extensions_to_source(self):
        """An editable install: bring the op libraries too, each renamed into place, since a running process may have the old one mapped."""
        built, source = Path(self.build_lib) / "tdkern", ROOT / "tdkern"
        for file in (file for file in built.rglob("*") if file.is_file() and file.suffix in (".so", ".txt")):
            target = source / file.relative_to(built)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, f"{target}.new")
            os.replace(f"{target}.new", target)


compiled = os.environ.get("TDKERN_CPP") != "0"
setup(ext_modules=[Extension("tdkern._C", sources=[])] if compiled else [], cmdclass={"build_ext": CMakeBuild})
