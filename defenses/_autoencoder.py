"""A small variational autoencoder of what tells clients' updates apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Autoencoder:
    """A variational autoencoder of σ(differences), three layers each way, with draws from ``source`` alone."""

    def __init__(self, size: int, hidden: int, latent: int, source: torch.Generator) -> None:
        widths = [
            (size, hidden),
            (hidden, hidden),
            (hidden, 2 * latent),
            (latent, hidden),
            (hidden, hidden),
            (hidden, size),
        ]
        self.source, self.weights = source, []
        for inside, outside in widths:
            weight = torch.empty(outside, inside, device=source.device)
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=source)
            self.weights += [weight.requires_grad_(), torch.zeros(outside, device=source.device, requires_grad=True)]
        self.optimiser = torch.optim.Adam(self.weights, fused=True)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, latent) of the code of x (B, size)."""
        w = self.weights
        x = functional.linear(functional.linear(x, w[0], w[1]).relu(), w[2], w[3]).relu()
        mean, raw = functional.linear(x, w[4], w[5]).chunk(2, dim=1)
        return mean, functional.softplus(raw)

    def decode(self, mean: Tensor, spread: Tensor) -> Tensor:
        """x̂ (B, size) of a code drawn from mean and log-variance."""
        w, noise = self.weights, torch.randn(mean.shape, generator=self.source, device=mean.device)
        z = functional.linear(mean + (spread / 2).exp() * noise, w[6], w[7]).relu()
        return functional.linear(functional.linear(z, w[8], w[9]).relu(), w[10], w[11]).sigmoid()

    @torch.enable_grad()
    def learn(self, rows: Tensor, epochs: int) -> None:
        """Train on the differences of the rows (S, size), S ≥ 2, in batches of 8."""
        pairs = torch.cartesian_prod(*[torch.arange(len(rows), device=rows.device)] * 2)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        for _ in range(epochs):
            order = torch.randperm(len(pairs), generator=self.source, device=rows.device)
            for one, other in (part.T for part in torch.split(pairs[order], 8)):
                x = (rows[one] - rows[other]).sigmoid()
                mean, spread = self.encode(x)
                divergence = (mean.square() + spread.exp() - 1 - spread).sum() / 2
                loss = (self.decode(mean, spread) - x).square().sum() + divergence
                self.optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimiser.step()

    @torch.no_grad()
    def error(self, differences: Tensor) -> Tensor:
        """The mean of ‖x − x̂‖² over the differences (S, size), both ways round, and over 10 draws."""
        x = torch.cat([differences, -differences]).sigmoid()
        mean, spread = self.encode(x)
        draws = [(self.decode(mean, spread) - x).square().sum(dim=1).mean() for _ in range(10)]
        return torch.stack(draws).mean()
