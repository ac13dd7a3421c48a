"""One attack and one defense without any experiment.

python examples/one_method.py
"""

from __future__ import annotations

import torch
from torch import nn

import fedsim
from fedsim.plugins import create

# One malicious client's training, on a fixed list of batches.
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 32), nn.ReLU(), nn.Linear(32, 10))
batches = [(torch.rand(32, 1, 28, 28), torch.randint(0, 10, (32,))) for _ in range(4)]
made = fedsim.local_attack(
    "anticipate", model, batches, trigger=create("trigger", "pixel_pattern", target=8), lr=0.05, k=3, epochs=2
)
print(f"Anticipate's update has norm {made.update.norm():.3f}")

# One round at the server: nine honest updates, and the attacker's boosted by ten.
honest = 0.05 * torch.randn(9, made.update.shape[0])
updates = torch.cat([honest, 10 * made.update[None]])
for name, parameters in (("fedavg", {}), ("norm_clipping", {"bound": 2.0}), ("multi_metrics", {"variant": "paper"})):
    result = fedsim.aggregate(name, updates=updates, **parameters)
    weight = float(result.weights[9])
    print(f"{name}: the attacker's weight is {weight:.2f}, the aggregate has norm {result.vector.norm():.3f}")
