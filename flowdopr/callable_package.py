"""Packages that can be called: `flowdopr.train` is a package, and `flowdopr.train(...)` trains."""

import importlib
import sys
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package whose call is that of the function of its name in `flowdopr.api`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        api = importlib.import_module("flowdopr.api")
        return getattr(api, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(name: str) -> None:
    """Give the package `name` a call."""
    sys.modules[name].__class__ = CallablePackage
