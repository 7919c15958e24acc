"""The examples in docstrings run and print what they say; every public name has one."""

import copy
import doctest
import importlib
import inspect
import pkgutil
import warnings

import pytest
import torch
from torch import nn

import minilora

MODULES = ["minilora", *(m.name for m in pkgutil.walk_packages(minilora.__path__, "minilora."))]


def examples(module):
    """Return the examples of a module, each with a namespace of its own."""
    names = vars(module) | {"minilora": minilora, "torch": torch, "nn": nn, "copy": copy}
    found = doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__, globs=names)
    return [test for test in found if test.examples]


def outcome(test):
    """Run an example and return what it says of the differences, if any."""
    said = []
    torch.manual_seed(0)
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    return "".join(said)


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples_print_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for test in examples(importlib.import_module(name)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not outcome(test), test.name


@pytest.mark.parametrize("name", minilora.__all__)
def test_every_public_name_has_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(minilora, name))


def test_an_example_that_prints_something_else_fails():
    module = type(doctest)("wrong")
    module.__doc__ = ">>> 1 + 1\n3\n"
    (test,) = examples(module)
    assert "Expected:\n    3\nGot:\n    2" in outcome(test)
