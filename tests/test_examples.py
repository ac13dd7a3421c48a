"""What the documentation shows runs; and the engine's core needs neither Ray nor Parquet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedsim

ROOT = Path(__file__).resolve().parent.parent

WITHOUT = """
import runpy, sys

for name in ("ray", "datasets", "flwr_datasets", "pyarrow", "pandas", "sklearn", "scipy", "PIL", "matplotlib",
             "safetensors", "jinja2", "torchtext", "mlxtend"):
    sys.modules[name] = None  # as if it were not installed
sys.argv = ["gpu.py", "--device", "cpu", "--smoke", "--rounds", "1"]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.slow
def test_one_method_outside_any_experiment() -> None:
    done = python("examples/one_method.py")
    assert done.returncode == 0, done.stderr
    assert "multi_metrics: the attacker's weight is 0.00" in done.stdout


@pytest.mark.slow
def test_the_gpu_benchmark_runs_with_torch_flwr_and_omegaconf_only() -> None:
    done = python("-c", WITHOUT)
    assert done.returncode == 0, done.stderr
    assert "anticipate_float32_checkpoint" in done.stdout


def test_plugins_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the plugin files lie beside the config, not here
    small = {
        "federation.rounds": 4,
        "federation.clients": 10,
        "attack.schedule": {"name": "single_shot", "rounds": [2, 3]},
        "attack.trigger": {"name": "patch", "target": 8},
        "task.data": "digits",
        "task.model": "logistic",
        "engine.name": "serial",
        "output.report": False,
    }
    config = fedsim.load_config(ROOT / "examples" / "own_methods.yaml", small)
    run = fedsim.run(config, out=tmp_path / "run")
    attacker = run.clients[run.clients["malicious"]]
    assert len(attacker) == 2
    honest = run.timings["attack_honest_norm"].dropna().to_numpy()
    assert (attacker["update_norm"].to_numpy() <= honest * (1 + 1e-3)).all()
    assert dict(attacker["scores"].iloc[0]).keys() == {"median_direction.angle"}
