"""Where things lie: the checkout, its scripts, and the data and reference numbers beside it."""

from __future__ import annotations

import importlib.util
import json
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("FEDSIM_SHARED", ROOT.parent / "shared"))


def shared_file(*parts: str) -> Path:
    """A file of the directory of data and reference numbers; the test is skipped where it is not."""
    path = SHARED.joinpath(*parts)
    if not path.is_file():
        pytest.skip(f"there is no {path}; set FEDSIM_SHARED to the directory that has it")
    return path


def reference_numbers(name: str) -> Any:
    """A file of reference numbers, such as ``attacks/pgd``; the test is skipped where it is not."""
    return json.loads(shared_file("reference", f"{name}.json").read_text())


@cache
def script(path: str) -> ModuleType:
    """The script at ``path`` below the root, such as ``benchmarks/catalogue.py``; it is loaded once."""
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
