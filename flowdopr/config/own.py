"""Functions of the user's own that a config names as `module:function`, for a model or a data set.

A config may be a stranger's, and to import a module runs its code. So only those functions are
imported that the environment of this process lists: `FLOWDOPR_CODE=my_models:make,my_data:make`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from flowdopr.config.errors import ConfigError, cut

VARIABLE = "FLOWDOPR_CODE"
_digests: dict[str, str] = {}
"""The SHA-256 of the file of each function that this process has imported, as it was then."""


def call_own(section: str, settings: Any, **given: Any) -> Any:
    """What the function that `settings.factory` names returns for `given` and `settings.options`.

    Its module is looked for where Python looks, and after that in the current folder.

    Args:
        section: the name of the section `settings`, for messages.

    Raises:
        ConfigError: the environment does not list the function, it is not there, or it fails.
    """
    factory, options = settings.factory, settings.options or {}
    place = f"{section}.factory: {factory}"
    allowed = os.environ.get(VARIABLE, "").replace(",", " ").split()
    if factory not in allowed:
        raise ConfigError(
            f"{place} is code, and {VARIABLE} does not list it; if you trust it, set "
            f"{VARIABLE}={','.join([*allowed, factory])}"
        )
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # at the end, so that it hides no package
    module, _, name = factory.partition(":")
    with explained(f"{place} cannot be imported", f"Python looks for it on sys.path and in {here}"):
        function = getattr(import_module(module), name)
    if file := getattr(sys.modules[module], "__file__", None):
        _digests.setdefault(factory, hashlib.sha256(Path(file).read_bytes()).hexdigest())
    with explained(f"{place} fails", f"correct it, or {section}.options"):
        return function(**given, **options)


@contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """A block of the user's code, any error of which ends in one line.

    Raises:
        ConfigError: `what`, what the error says, and `remedy`.
    """
    try:
        yield
    except Exception as error:
        said = cut(" ".join(str(error).split()), 300)
        raise ConfigError(
            f"{what}: {type(error).__name__}: {said}; {remedy}; FLOWDOPR_TRACEBACK=1 shows more"
        ) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A block whose errors of settings name the run or file at `path`, which has the settings."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def own_code(*sections: Any) -> dict[str, Any]:
    """`{"code": {factory: sha256}}` of the functions that `sections` name, for records; {} if they
    name none. The hash is that of the module's file."""
    named = [getattr(section, "factory", None) for section in sections]
    found = {factory: _digests[factory] for factory in named if factory in _digests}
    return {"code": found} if found else {}
