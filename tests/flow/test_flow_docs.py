"""The examples in docstrings run and print what they say; every public name is exported."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import flowdopr.flow

MODULES = [module.name for module in pkgutil.iter_modules(flowdopr.flow.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(f"flowdopr.flow.{name}")
    assert module.__doc__
    assert doctest.testmod(module).failed == 0


def test_every_exported_name_exists_and_is_documented():
    for name in flowdopr.flow.__all__:
        value = getattr(flowdopr.flow, name)
        assert not (inspect.isclass(value) or inspect.isfunction(value)) or value.__doc__
