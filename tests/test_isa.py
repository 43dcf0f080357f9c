"""Each instruction set that this machine has below the live one passes the kernel tests."""

import pytest
from conftest import ROOT, kernel_test_files, run_kernel_tests, run_python

import fastcv

INFO = fastcv.build_info()
LOWER = INFO["available_isas"][: INFO["available_isas"].index(INFO["cpu_isa"])]


@pytest.mark.parametrize("isa", LOWER)
def test_operators(isa):
    files = [ROOT / "tests/test_stable_boxing.py", *kernel_test_files()]
    run_kernel_tests(files, environment={"FASTCV_CPU_ISA": isa})


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


@pytest.mark.parametrize("isa", LOWER)
def test_programs(isa):
    arguments = [
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-k",
        "steps or norm or bfloat16 or threads",
    ]
    file = ROOT / "tests/accelerate/test_program.py"
    result = run_python([*arguments, str(file)], environment={"FASTCV_CPU_ISA": isa})
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-6000:] + result.stderr
