"""The manifest: what really ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from fedsim import plugins
from fedsim.config import Choice, Config
from fedsim.federation.engine import cores
from fedsim.federation.schedule import RoundPlan
from fedsim.recording.portable import portable

_PACKAGES = (
    "fedsim-backdoor",
    "torch",
    "flwr",
    "ray",
    "numpy",
    "flwr-datasets",
    "omegaconf",
    "pyarrow",
    "scikit-learn",
    "scipy",
)


def versions() -> dict[str, str]:
    """Python's and the packages' versions, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory, GPUs. No host or user name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": round(memory, 1),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def methods(config: Config) -> dict[str, Any]:
    """The classes and parameters behind every name of the config; of paths only their last part."""

    def one(choice: Choice) -> dict[str, Any]:
        cls = plugins.get(choice.kind, choice.name)
        own = {k: v for k, v in choice.to_dict().items() if k not in ("name", "path")}
        return {"name": choice.name, "class": f"{cls.__module__}.{cls.__qualname__}", "parameters": own}

    found: dict[str, Any] = {
        "task": one(Choice("task", config.task.name, config.task.parameters)),
        "dataset": one(config.task.data),
        "model": one(config.task.model),
        "partition": one(config.federation.partition),
        "defense": [one(stage) for stage in config.defense],
    }
    attack = config.attack
    if attack is not None and attack.name != "none":
        cls: Any = plugins.get("attack", attack.name)
        found["attack"] = {
            **one(Choice("attack", attack.name, attack.parameters)),
            "knows": sorted(str(k) for k in cls.knowledge(attack.parameters)),
            "trigger": one(attack.trigger),
            "schedule": one(attack.schedule),
            "craft": [one(step) for step in attack.craft],
        }
    return {key: portable(value) for key, value in found.items()}


def adversary(plan: list[RoundPlan]) -> dict[str, Any]:
    """Who attacked when."""
    rounds = {str(r.round): sorted(r.malicious) for r in plan if r.malicious}
    return {
        "rounds": len(rounds),
        "first": min(map(int, rounds), default=None),
        "last": max(map(int, rounds), default=None),
        "malicious_clients_by_round": rounds,
    }
