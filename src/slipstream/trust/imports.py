"""Importing from a verified folder: Python is executed from the bytes that were hashed, and only pinned files are seen.

Python's own importer would look for bytecode, find what was added meanwhile, and write bytecode beside the sources. This one
knows the list of pinned files, and refuses every other name below its package.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import decode_source, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


class VerifiedPackage(MetaPathFinder):
    """Finds the modules of one package.

    Args:
        name: in sys.modules. It is made from the hash of the tree, so it is nobody else's.
        folder: the package's folder; what its code reads beside itself lies there.
        sources: file name -> bytes that were verified.
        others: names of the files that are not Python.
        tag: whatever the caller wants to find again.
    """

    def __init__(self, name: str, folder: Path, sources: Mapping[str, bytes], others: frozenset[str], tag: Any) -> None:
        self.name, self.folder, self.sources, self.others, self.tag = name, folder, sources, others, tag

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name and not fullname.startswith(f"{self.name}."):
            return None
        base = fullname[len(self.name) + 1 :].replace(".", "/")
        package, module = (f"{base}/__init__.py", f"{base}.py") if base else ("__init__.py", "")
        for file in (package, module):
            if file in self.sources:
                where = str(self.folder / file)
                loader = _Verified(where, self.sources[file], file == package)
                below = [str(self.folder / base)] if file == package else None
                return spec_from_file_location(fullname, where, loader=loader, submodule_search_locations=below)
        for file in (f"{base}{suffix}" for suffix in EXTENSION_SUFFIXES):
            if file in self.others:
                where = str(self.folder / file)
                return spec_from_file_location(fullname, where, loader=ExtensionFileLoader(fullname, where))
        if any(f.startswith(f"{base}/") for f in (*self.sources, *self.others)):
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(self.folder / base)]
            return spec
        raise ModuleNotFoundError(f"{fullname} is not among the pinned files of {self.folder}", name=fullname)


class _Verified(ExecutionLoader):
    """Executes a source that is in memory already. It has no path to bytecode, neither to read nor to write it."""

    def __init__(self, path: str, source: bytes, package: bool) -> None:
        self.path, self.source, self.package = path, source, package

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_source(self, fullname: str) -> str:
        return decode_source(self.source)

    def is_package(self, fullname: str) -> bool:
        return self.package


def packages() -> list[VerifiedPackage]:
    """Those that were imported and stayed."""
    return [finder for finder in sys.meta_path if isinstance(finder, VerifiedPackage)]


def import_verified(package: VerifiedPackage) -> ModuleType:
    """Import it. If that fails, nothing of it stays."""
    if all(other.name != package.name for other in packages()):
        forget(package)  # what somebody put under its name is not it
    sys.meta_path.insert(0, package)
    try:
        return importlib.import_module(package.name)
    except BaseException:
        forget(package)
        raise


def forget(package: VerifiedPackage) -> None:
    if package in sys.meta_path:
        sys.meta_path.remove(package)
    for name in [n for n in sys.modules if n == package.name or n.startswith(f"{package.name}.")]:
        del sys.modules[name]
