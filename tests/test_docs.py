"""Every example in the documentation runs and gives what it says."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest
from conftest import ROOT

import fastcv

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


COMPILED = ("fastcv._C_cpu", "fastcv._C_cuda", "fastcv._host")


def modules():
    names = [module.name for module in pkgutil.walk_packages(fastcv.__path__, "fastcv.")]
    return ["fastcv", *(n for n in names if n not in COMPILED and not n.endswith("__main__"))]


def examples(name):
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(module, name) if test.examples]


@pytest.mark.parametrize("name", modules())
def test_examples(name):
    if name.startswith("fastcv.interop"):
        pytest.importorskip("torchvision")
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    report = []
    for test in examples(name):
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_every_public_function_has_an_example():
    functions = {name: getattr(fastcv.ops, name) for name in fastcv.ops.__all__}
    without = [
        name
        for name, function in functions.items()
        if inspect.isfunction(function) and ">>>" not in (function.__doc__ or "")
    ]
    assert without == []


def test_readme():
    """The Python blocks of the README, one after the other in one namespace."""
    pytest.importorskip("torchvision")
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    namespace = {"__name__": "readme"}
    try:
        for number, block in enumerate(blocks):
            exec(compile(block, f"README.md, Python block {number + 1}", "exec"), namespace)
    finally:
        fastcv.unpatch("torchvision")


def test_no_machine_paths():
    """Nothing in the documentation points into somebody's machine."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/**/*")]:
        if path.is_file() and path.suffix != ".png":
            assert not re.search(r"/(root|home|tmp|work)/", path.read_text()), path


def test_links_between_files():
    """What the documentation links to in the repository is there."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/**/*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)\)", path.read_text()):
            assert "://" in link or (path.parent / link).exists(), f"{path.name}: {link}"
