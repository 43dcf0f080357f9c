"""Builds the compiled part by calling CMake with Ninja; everything else stands in pyproject.toml."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def run(self):
        torch = importlib.util.find_spec("torch")
        if torch is None:
            raise SystemExit(
                "fastcv needs torch at build time, the same torch that you run with: install torch, "
                "then `pip install --no-build-isolation -e .`"
            )
        pybind11 = importlib.import_module("pybind11")
        output = ROOT / "fastcv" if self.inplace else Path(self.build_lib).resolve() / "fastcv"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DFASTCV_TORCH_DIR={Path(torch.origin).parent}",
            f"-DFASTCV_OUTPUT_DIR={output}",
            f"-DFASTCV_CUDA={os.environ.get('FASTCV_CUDA', 'auto')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        if architectures := os.environ.get("FASTCV_CUDA_ARCHITECTURES"):
            configure.append(f"-DFASTCV_CUDA_ARCHITECTURES={architectures}")
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(build)])

    def get_outputs(self):
        return []


setup(ext_modules=[Extension("fastcv._C_cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
