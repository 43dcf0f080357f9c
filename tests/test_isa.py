"""Each instruction set that this machine has below the live one passes the kernel tests."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import KERNEL_TESTS, ROOT, kernel_test_files, run_kernel_tests, run_python

import fastcv

INFO = fastcv.build_info()
LOWER = INFO["available_isas"][: INFO["available_isas"].index(INFO["cpu_isa"])]


@pytest.fixture(scope="module")
def reruns():
    """What runs the tests of operators and programs at each level: two at a time, of a thread each."""
    operators = [ROOT / "tests/test_stable_boxing.py", *kernel_test_files()], KERNEL_TESTS
    programs = [ROOT / "tests/accelerate/test_program.py"], "steps or norm or bfloat16 or threads"
    with ThreadPoolExecutor(2) as pool:
        yield {
            (isa, name): pool.submit(
                run_kernel_tests, files, select, environment={"FASTCV_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
            )
            for name, (files, select) in {"operators": operators, "programs": programs}.items()
            for isa in LOWER
        }


@pytest.mark.parametrize("isa", LOWER)
@pytest.mark.parametrize("name", ["operators", "programs"])
def test_kernels(name, isa, reruns):
    reruns[isa, name].result()


@pytest.mark.parametrize("isa", [*INFO["available_isas"], "avx9000", ""])
def test_environment_variable(isa):
    """It lowers the level, to one that the processor has; an unknown value is ignored aloud."""
    script = "import fastcv; print(fastcv.build_info()['cpu_isa'])"
    result = run_python(["-c", script], environment={"FASTCV_CPU_ISA": isa})
    if isa in INFO["available_isas"]:
        assert (result.stdout.strip(), result.stderr) == (isa, "")
    else:
        assert result.stdout.strip() == INFO["available_isas"][-1]
        assert ("FASTCV_CPU_ISA=avx9000 is ignored" in result.stderr) == bool(isa)
