"""A C++ program without torch links the installed kernels."""

import os
import shutil
import subprocess
import sysconfig

import pytest
from conftest import ROOT

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include "nms/nms.h"

int main() {
  const float boxes[] = {0, 0, 10, 10, 1, 1, 10, 10, 20, 20, 30, 30};
  const int32_t order[] = {0, 1, 2};
  uint8_t keep[3];
  void* scratch = std::aligned_alloc(64, (FASTCV_PICK(nms_scratch_bytes<float>)(3) + 63) / 64 * 64);
  const fastcv::NmsSegment<float> segment{boxes, order, 3, 0.5, false, keep, 3};
  const int64_t kept = FASTCV_PICK(nms_segment<float>)(segment, scratch);
  std::printf("%s: %d kept: %d %d %d\n", fastcv::cpu_isa_name(fastcv::cpu_isa()), int(kept),
              keep[0], keep[1], keep[2]);
  std::free(scratch);
}
"""

PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(program LANGUAGES CXX)
find_package(fastcv REQUIRED)
add_executable(program main.cpp)
target_link_libraries(program PRIVATE fastcv::fastcv_kernels)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    builds = sorted(ROOT.glob("build/*/libfastcv_kernels.a"), key=os.path.getmtime)
    if not builds:
        pytest.skip("needs the build tree of an editable installation: make setup")
    folder = tmp_path_factory.mktemp("program")

    def run(*command):
        result = subprocess.run([cmake, *map(str, command)], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    run("--install", builds[-1].parent, "--prefix", folder / "installed")
    (folder / "main.cpp").write_text(PROGRAM)
    (folder / "CMakeLists.txt").write_text(PROJECT)
    prefix = f"-DCMAKE_PREFIX_PATH={folder / 'installed'}"
    run("-S", folder, "-B", folder / "build", "-DCMAKE_BUILD_TYPE=Release", prefix)
    run("--build", folder / "build")
    return folder / "build" / "program"


@pytest.mark.parametrize("isa", ["baseline", ""])
def test_runs_and_is_right(program, isa):
    environment = {**os.environ, "FASTCV_CPU_ISA": isa}
    result = subprocess.run([program], capture_output=True, text=True, env=environment)
    level, answer = result.stdout.strip().split(": ", 1)
    assert answer == "2 kept: 1 0 1"
    assert level == isa or not isa


def test_needs_no_torch(program):
    needed = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
    assert needed and "torch" not in needed and "c10" not in needed
