"""Modules of large packages, imported without the rest of the package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from types import ModuleType


def module_alone(name: str, without: Iterable[str]) -> ModuleType:
    """Import a module, but not what its package and others say in their ``__init__``.

    ``import package.module`` runs ``package/__init__.py`` first, which may import everything there is. Empty
    packages stand in for the time of the import; afterwards all of it is taken out again, so that somebody who
    imports the package gets the real one.

    Args:
        name: the full name of the module.
        without: packages whose ``__init__`` is not to run, outer ones first.

    Returns:
        The module; the one that there is, when its package was imported by somebody already.

    Raises:
        ModuleNotFoundError: it, or a package, is not installed.
    """
    absent = [package for package in without if package not in sys.modules]
    if name in sys.modules or name.split(".")[0] not in absent:
        return importlib.import_module(name)
    roots = tuple({package.split(".")[0] for package in absent})
    before = {key for key in sys.modules if key.startswith(roots)}
    try:
        for package in absent:
            sys.modules[package] = _empty(package)
        return importlib.import_module(name)
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] in roots and key not in before]:
            del sys.modules[key]


def _empty(package: str) -> ModuleType:
    """A package whose modules can be found, and that has nothing else in it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    found = ModuleType(package)
    found.__path__ = list(spec.submodule_search_locations)
    found.__spec__ = importlib.util.spec_from_loader(package, loader=None, is_package=True)
    return found
