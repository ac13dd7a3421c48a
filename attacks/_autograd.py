"""Around a graph that is built twice: repeat its random draws, count what it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def random_state(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Remember where torch's random streams stand (dropout); the result, called, repeats from there."""
    cuda = device.type == "cuda"
    cpu_state, cuda_state = torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None

    @contextlib.contextmanager
    def repeat() -> Iterator[None]:
        with torch.random.fork_rng(devices=[device] if cuda else []):
            torch.set_rng_state(cpu_state)
            if cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state, device)
            yield

    return repeat


class SavedBytes:
    """Counts the bytes of distinct storages that autograd holds for backward passes."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.holders: dict[int, int] = {}

    def watch(self) -> saved_tensors_hooks:
        """A context within which saved tensors are counted."""
        return saved_tensors_hooks(lambda tensor: _Saved(tensor.detach(), self), lambda saved: saved.tensor)

    def count(self, tensor: Tensor, change: int) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        holders = self.holders.pop(key, 0) + change
        if holders:
            self.holders[key] = holders
        if holders == 0 or (holders == 1 and change == 1):
            self.live += change * storage.nbytes()
            self.peak = max(self.peak, self.live)


class _Saved:
    """A tensor autograd saved, counted for as long as autograd keeps it."""

    def __init__(self, tensor: Tensor, meter: SavedBytes) -> None:
        self.tensor, self.meter = tensor, meter
        meter.count(tensor, 1)

    def __del__(self) -> None:
        self.meter.count(self.tensor, -1)
