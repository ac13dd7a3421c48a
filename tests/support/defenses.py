"""Every registered defense, with few clients and little to compute."""

from __future__ import annotations

from typing import Any

REQUIRED: dict[str, dict[str, Any]] = {
    "flower": {"strategy": "FedMedian"},
    "deepsight": {"inputs": 50},
    "backdoor_indicator": {"epochs": 20},
    "fldetector": {"window": 1, "warm_up": 0, "references": 2, "max_clusters": 3},
    "rflbat": {"references": 2, "max_clusters": 3},
}
"""Parameters of the methods that have no default for all of them, or a costly one."""
