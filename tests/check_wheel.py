"""Build the wheel and check what it holds: our three packages, the configs, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build_wheel(target: Path) -> Path:
    """The wheel of this checkout, built into ``target``."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(ROOT)]
    subprocess.run(command, check=True)
    return next(target.glob("*.whl"))


def complaints(wheel: Path) -> list[str]:
    """What is wrong with the contents of the wheel."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    found = []
    if tops != {"fedsim", "attacks", "defenses"}:
        found.append(f"top-level packages are {sorted(tops)}, expected attacks, defenses, fedsim")
    shipped = {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    packed = {name.removeprefix("fedsim/") for name in names if name.startswith("fedsim/configs/")}
    if packed != shipped:
        found.append(f"configs differ from the checkout: {sorted(packed ^ shipped)}")
    needed = {"fedsim/py.typed"}
    needed |= {f"fedsim/report/{name}" for name in ("report.html.jinja", "report.css")}
    needed |= {f"fedsim/report/grid.{kind}" for kind in ("html.jinja", "css", "js")}
    found += [f"{name} is missing" for name in sorted(needed - set(names))]
    found += [f"{name} does not belong in a wheel" for name in names if name.endswith((".pyc", ".parquet"))]
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        problems = complaints(build_wheel(Path(directory)))
    for problem in problems:
        print(f"wheel: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)
