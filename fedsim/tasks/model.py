"""The model interface: which network is trained."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedsim.errors import InputError
from fedsim.plugins import Plugin


class Model(Plugin):
    """A network, made to measure for a data set; ``build`` is all there is to write.

    The network takes float pixels in [0, 1] and normalises them itself. What it is made of has to
    * be freshly initialised from torch's global generator and from nothing else,
    * be twice differentiable (attacks unroll training), so without operations in place,
    * accept channels-last inputs and bf16 autocast.
    Dropout draws from torch's global generator too; the engine seeds that per round and client.
    """

    kind: ClassVar[str] = "model"

    @abstractmethod
    def build(
        self, shape: tuple[int, int, int], classes: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> nn.Module:
        """The network, mapping (B, C, H, W) to logits (B, classes).

        shape: (C, H, W) of an image. mean, std: per channel, of pixels in [0, 1].

        Raises
        ------
        InputError: the network does not fit the data; the message says which sizes it takes.
        """

    def require(self, fits: bool, shape: tuple[int, int, int], takes: str) -> None:
        """Refuse images that do not fit.

        Raises
        ------
        InputError
        """
        if not fits:
            _, height, width = shape
            raise InputError(f"model {self.name!r} takes {takes}; the data's images are {height}×{width}")


class Normalise(nn.Module):
    """(pixels − mean) / std per channel, the first layer of an image network.

    The two constants are buffers, so they follow the network to a device, but not persistent ones: they are
    in no state dict and travel with no update.

    Raises
    ------
    InputError: another number of channels than means or deviations, or a deviation that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if not len(mean) == len(std) == channels:
            raise InputError(
                f"images of {channels} channels need as many means and deviations, not {len(mean)} and {len(std)}"
            )
        if not min(std) > 0:
            raise InputError(f"the deviations to normalise with must be positive, not {list(std)}")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, C, H, W)."""
        return (pixels - self.mean) / self.std


class Classifier(nn.Module):
    """Normalise → features → head: the form every image network here has.

    features: maps normalised images to (B, F), the representation some methods compare or train by itself.
    head: the last linear layer, F → classes.
    """

    def __init__(self, normalise: Normalise, features: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.normalise = normalise
        self.features = features
        self.head = head

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes) of pixels (B, C, H, W) in [0, 1]."""
        logits: Tensor = self.head(self.features(self.normalise(pixels)))
        return logits
