"""The wheel, installed and used outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from fedsim.config import config_directory
from tests.support.places import ROOT, script
from tests.support.runs import contents, differing

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def check_wheel() -> ModuleType:
    """The script that ``make lint`` runs."""
    return script("tests/check_wheel.py")


@pytest.fixture(scope="module")
def wheel(check_wheel: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = check_wheel.build_wheel(tmp_path_factory.mktemp("wheel"))
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory the wheel is installed into, alone."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, timeout=120)
    return target


def use(installed: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with the installed wheel before everything else, far from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_wheel_holds_what_it_should(check_wheel, wheel):
    assert check_wheel.complaints(wheel) == []


def test_the_check_complains(check_wheel, wheel, tmp_path):
    """A wheel with a stray package, a missing config and a data file is found out."""
    bad = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            if name not in ("fedsim/configs/quickstart.yaml", "fedsim/py.typed"):
                target.writestr(name, source.read(name))
        target.writestr("tests/test_x.py", "")
        target.writestr("fedsim/data.parquet", "")
    found = "\n".join(check_wheel.complaints(bad))
    assert "top-level packages are ['attacks', 'defenses', 'fedsim', 'tests']" in found
    assert "configs differ from the checkout: ['configs/quickstart.yaml']" in found
    assert "fedsim/py.typed is missing" in found
    assert "fedsim/data.parquet does not belong" in found


def test_it_is_the_wheel_that_is_used_and_it_works_outside_the_checkout(installed, tmp_path):
    code = """
import sys, attacks, defenses, fedsim
print(fedsim.__file__, attacks.__file__, defenses.__file__, sep="\\n")
from fedsim.cli import app, guarded
for arguments in (["validate", "quickstart", "base"], ["list", "attacks"], ["list", "configs"]):
    status = guarded(lambda **options: app(arguments, **options))
    assert status == 0, status
from fedsim.report import html
"""
    done = use(installed, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [str(installed / package / "__init__.py") for package in ("fedsim", "attacks", "defenses")]
    assert lines[3:5] == ["quickstart: ok", "base: ok"]
    assert "anticipate" in done.stdout
    files = (p for p in config_directory().rglob("*.yaml") if p.parent.name != "bench")
    shipped = {p.relative_to(config_directory()).with_suffix("").as_posix() for p in files}
    assert shipped <= set(lines)
    assert str(ROOT) not in done.stdout


def test_a_run_from_the_wheel(installed, tmp_path, tiny_file, finished):
    done = use(installed, "-m", "fedsim", "run", str(tiny_file), "--out", "run", "output.report=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()
    assert differing(tmp_path / "run", contents(finished.directory)) == []
