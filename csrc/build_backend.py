"""The build backend: setuptools', and an answer to one question, which torch to build against.

The extension needs some torch's headers and libraries, of any version from MINIMUM_TORCH on: it uses LibTorch's stable
ABI. An isolated build (plain `pip install .`) hides the torch that is already installed, and a `torch` among the static
build requirements would make pip download another one of several gigabytes. So torch is required only where there is
none.
"""

from __future__ import annotations

import importlib.util
import re
import site
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import build_meta

MINIMUM_TORCH = (2, 11)

prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    if find_torch() is not None:
        return []
    return ["torch>=" + ".".join(map(str, MINIMUM_TORCH))]


get_requires_for_build_editable = get_requires_for_build_wheel


class Torch(NamedTuple):
    """A torch to build against; `root` is the folder of the package."""

    root: Path
    version: str

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


def find_torch() -> Torch | None:
    """The first suitable torch: the importable one, else one of the environments that an isolated build hides.

    It is looked at, not imported, because what it imports itself may be hidden.
    """
    for spec in _torch_specs():
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent
        match = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", _read(root / "version.py"))
        header = root / "include/torch/csrc/stable/library.h"
        if match and (int(match[2]), int(match[3])) >= MINIMUM_TORCH and header.exists():
            return Torch(root, match[1])
    return None


def _torch_specs() -> Iterator[ModuleSpec | None]:
    yield importlib.util.find_spec("torch")
    # An isolated build's interpreter is still the one that pip runs in: its prefixes lead to the hidden packages.
    for folder in [*site.getsitepackages([sys.prefix, sys.base_prefix]), site.getusersitepackages()]:
        yield PathFinder.find_spec("torch", [folder])


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
