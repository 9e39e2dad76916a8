"""The examples in docstrings run, in every module of the package.

Examples use `torch`, `pyro`, `pyro.distributions` as `dist`, the package as `pf`, and the public names of the package without an import.
"""

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows_ext

ROOMS = [
    "ops",
    "nn",
    "transforms",
    "distributions",
    "programs",
    "guides",
    "infer",
    "diagnostics",
]


def _modules():
    for part in pkgutil.walk_packages(pyro_flows_ext.__path__, "pyro_flows_ext."):
        if not part.name.endswith("__main__"):
            yield part.name


def _names():
    names = {"torch": torch, "pyro": pyro, "dist": dist, "pf": pyro_flows_ext}
    for room in ROOMS:
        module = importlib.import_module(f"pyro_flows_ext.{room}")
        public = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
        names.update({name: getattr(module, name) for name in public})
    return names


def _examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in _modules():
        # Whatever follows `Example:` and `>>>` is found by reading the file: no module is imported at collection.
        source = Path(importlib.util.find_spec(name).origin).read_text()
        if ">>>" in source:
            module = importlib.import_module(name)
            for test in finder.find(module, name, extraglobs=_names()):
                if test.examples:
                    yield pytest.param(test, id=test.name.removeprefix("pyro_flows_ext."))


@pytest.mark.parametrize("test", list(_examples()))
def test_example(test):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report = []
    runner.run(test, out=report.append, clear_globs=False)
    assert runner.failures == 0, "".join(report)
