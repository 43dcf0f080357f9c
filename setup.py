"""Builds the compiled part: calls CMake with Ninja. Everything else stands in pyproject.toml."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str:
    """The one that pip installed beside this interpreter, even where its folder is not on PATH."""
    beside = sysconfig.get_path("scripts")
    path = shutil.which(name, path=beside) or shutil.which(name)
    if path is None:
        raise SystemExit(f"fastcv needs {name} at build time: pip install {name}")
    return path


class CMakeBuild(build_ext):
    def run(self):
        torch = importlib.util.find_spec("torch")
        if torch is None:
            raise SystemExit(
                "fastcv needs torch at build time, the same torch that you run with: "
                "install torch, then `pip install --no-build-isolation -e .`"
            )
        pybind11 = importlib.import_module("pybind11")
        output = ROOT / "fastcv" if self.inplace else Path(self.build_lib).resolve() / "fastcv"
        kind = "inplace" if self.inplace else "wheel"
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{kind}"
        cmake = find_tool("cmake")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DFASTCV_TORCH_DIR={Path(torch.origin).parent}",
            f"-DFASTCV_OUTPUT_DIR={output}",
            f"-DFASTCV_CUDA={os.environ.get('FASTCV_CUDA', 'auto').lower()}",
            f"-DFASTCV_CUDA_ARCHITECTURES={os.environ.get('FASTCV_CUDA_ARCHITECTURES', '')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.check_call(configure)
        subprocess.check_call([cmake, "--build", str(build)])

    def get_outputs(self):
        return []


# What the extension depends on is what a source distribution carries along.
sources = ["CMakeLists.txt", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/*/*.*")))]
setup(
    ext_modules=[Extension("fastcv._C_cpu", sources=[], depends=sources)],
    cmdclass={"build_ext": CMakeBuild},
)
