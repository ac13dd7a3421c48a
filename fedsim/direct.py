"""One method, outside any experiment: for plugin authors, notebooks and the parity tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedsim import plugins
from fedsim.defense import Aggregation, Defense, RoundUpdates, apply_pipeline


def aggregate(
    defense: str | Defense,
    *,
    updates: Tensor,
    num_examples: Tensor | Sequence[int] | None = None,
    global_vector: Tensor | None = None,
    trainable: int | None = None,
    clients: Sequence[int] | None = None,
    round: int = 1,
    seed: int = 0,
    **parameters: Any,
) -> Aggregation:
    """Run one defense on one matrix of updates.

    Parameters
    ----------
    defense: a registered name, or a stage made before (which keeps its state from call to call).
    updates: (N, D) client minus global. With ``global_vector`` zero these are whole weights.
    num_examples: (N,) examples per client, the weights of the mean; default: all equal.
    global_vector: (D,) the global model the clients started from; default: zeros.
    trainable: length of the trainable part of the vector; default: all of it.
    parameters: the defense's own.

    Returns
    -------
    Aggregation, whose ``vector`` (D,) is the aggregated *update* and ``model`` the new global model.

    Raises
    ------
    PluginError: unknown defense or parameter. ValueError: shapes that do not fit or values that are not finite.
    RunError: fewer clients than the method needs.
    """
    if updates.ndim != 2 or not updates.is_floating_point():
        raise ValueError(f"updates must be a floating-point matrix (N, D), not {tuple(updates.shape)}")
    if not bool(torch.isfinite(updates).all()):
        raise ValueError("updates must be finite")
    n, d = updates.shape
    examples = torch.ones(n) if num_examples is None else torch.as_tensor(num_examples)
    if tuple(examples.shape) != (n,):
        raise ValueError(f"num_examples must have shape ({n},), not {tuple(examples.shape)}")
    base = torch.zeros_like(updates[0]) if global_vector is None else global_vector
    if tuple(base.shape) != (d,):
        raise ValueError(f"global_vector must have shape ({d},), not {tuple(base.shape)}")
    examples = examples.to(device=updates.device, dtype=updates.dtype)
    stage = plugins.create("defense", defense, **parameters) if isinstance(defense, str) else defense
    return apply_pipeline(
        [stage],
        RoundUpdates(
            updates=updates,
            num_examples=examples,
            global_vector=base.to(updates.dtype),
            weights=examples.clone(),
            accepted=torch.ones(n, dtype=torch.bool, device=updates.device),
            trainable=d if trainable is None else trainable,
            clients=tuple(clients) if clients is not None else tuple(range(n)),
            round=round,
            seed=seed,
        ),
    )
