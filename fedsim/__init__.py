"""fedsim: federated learning under backdoor attack, and how long the backdoor lives."""

import os

# Before flwr and ray are imported anywhere: nobody is told what runs here.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.config import load_config
    from fedsim.direct import aggregate, local_attack
    from fedsim.experiment import Run, run

_HOMES = {
    "aggregate": "fedsim.direct",
    "load_config": "fedsim.config",
    "local_attack": "fedsim.direct",
    "Run": "fedsim.experiment",
    "run": "fedsim.experiment",
}

__all__ = ["Run", "aggregate", "load_config", "local_attack", "run"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: ``fedsim --help`` need not wait for torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
