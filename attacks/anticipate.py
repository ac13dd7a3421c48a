"""Anticipate: the backdoor is trained through the rounds that will follow it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attacks._autograd import SavedBytes, random_state
from fedsim.attack import Attack, AttackContext
from fedsim.batch import Batch
from fedsim.errors import RunError
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class AnticipateParameters(Parameters):
    k: int = parameter(9, "simulated rounds the backdoor is trained through, the current one included", ge=1)
    second_order: bool = parameter(
        True, "differentiate through simulated training; false: take its gradients as constants"
    )
    checkpoint: bool = parameter(
        False, "recompute each simulated round instead of keeping its graph: memory of one round, same result"
    )
    clients: int | None = parameter(None, "n of the simulated mean; null: the clients of the round", ge=1)
    benign_epochs: int | None = parameter(
        None, "gradient steps of a simulated round; null: as many as the others train epochs", ge=1
    )
    simulation_batch: str = parameter(
        "first",
        "batch of a simulated round: the first of a freshly shuffled epoch, or the next of a running one",
        choices=("first", "next"),
    )
    simulate_boost: float | None = parameter(
        None, "the attacker's own boost γ, simulated in the current round; null: none", gt=0
    )
    simulate_clip: float | None = parameter(
        None, "the server's clip S of every update's L2 norm, simulated; null: none", gt=0
    )


@register("anticipate")
class Anticipate(Attack):
    """The attacker unrolls the next k rounds of the federation inside its own loss (second order).

    With θ_g the global model, θ_a the attacker's and f the poisoned half-batch B', each step minimises
    ``L(θ_a) = Σ_{j<k} CE(f_{θ_j}(B'))`` (algorithm 1 of the paper) over simulated global models

    * ``θ_0 = θ_g + (Δ_a + (n − 1) Δ_b) / n``, ``Δ_a = θ_a − θ_g``, ``Δ_b = Sim_0(θ_g) − θ_g``,
    * ``θ_j = Sim_j(θ_{j−1})`` for j = 1 … k − 1,

    where ``Sim_j`` is a round of the honest clients in the attacker's imagination: ``benign_epochs`` steps of
    plain gradient descent with their learning rate of that round, ``lr γ^j``, on one clean batch of the
    attacker's own. The optimiser of θ_a is SGD with the attacker's momentum and weight decay, and lives for
    all its epochs.

    Followed from the authors' code (YuxinWenRick/thinking-two-moves-ahead) rather than the paper:

    * The loss is summed over all k rounds. All n − 1 honest clients are one simulated client.
    * A simulated round draws the *first* batch of a shuffled epoch (``simulation_batch: first``) and stays on
      it.
    * Models with BatchNorm are simulated in training mode, where running statistics influence no output;
      those that are sent equal the global model's exactly.
    * Boost and clip come after training and are not simulated. (Their round counts from 0, ours from 1.)
    * A recurrent network begins every batch anew in the simulation, also where honest training carries its
      state from batch to batch.

    Beyond the paper, ``simulate_boost`` and ``simulate_clip`` put into the simulation what the server will
    see: ``Δ_a ← clip_S(γ Δ_a)`` in the current round and ``Δ ← clip_S(Δ)`` for the simulated honest update of
    *every* round, ``clip_S(Δ) = Δ · S / max(S, ‖Δ‖₂)``, over the trainable parameters (the running statistics
    of Δ_a are zero; those of the simulated clients do not count). ``second_order: false`` takes simulated
    gradients as constants, so that ``∂θ_j/∂θ_{j−1}`` is the identity.

    The gradient is computed by the adjoint recursion, with λ_{k−1} = ∇L_{k−1}(θ_{k−1}) and L_j the loss at
    θ_j: ``λ_{j−1} = ∇L_{j−1}(θ_{j−1}) + (∂Sim_j/∂θ)ᵀ λ_j``, and at last ``(∂θ_0/∂θ_a)ᵀ λ_0``. ``checkpoint``
    decides whether the graph of Sim_j is kept or made again when its turn comes; nothing else differs. Sim_0
    does not depend on θ_a and is never differentiated.

    cuDNN's recurrent layers cannot be differentiated twice: on CUDA a network that has any is unrolled without
    cuDNN, unless ``second_order`` is false.

    Cost: about 2 k · benign_epochs + k times a plain step, a third more with ``checkpoint``, and memory
    for k · benign_epochs batches (``benign_epochs`` with ``checkpoint``). Recorded: ``anticipate_seconds``,
    the time of training; ``anticipate_saved_bytes``, the most that autograd kept for its backward passes at
    one moment of the first batch; on CUDA ``anticipate_peak_bytes``, the allocator's peak.
    """

    paper = "Wen et al., Thinking Two Moves Ahead, arXiv 2210.09305"
    cost = "k (2 E + 1) times an honest round for E benign epochs; memory for k E batches"
    Parameters = AnticipateParameters

    def train(self, context: AttackContext) -> None:
        model, settings = context.model, context.settings
        started = time.perf_counter()
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        model.module.train()
        optimiser = model.sgd(settings.lr, settings.momentum, settings.weight_decay)
        future = _Future(self.parameters, context)
        meter = SavedBytes()
        step = epoch = 0
        while (epoch < settings.epochs) if settings.steps is None else (step < settings.steps):
            before = step
            for batch in context.batches():
                if settings.steps is not None and step >= settings.steps:
                    break
                with meter.watch() if step == 0 else contextlib.nullcontext():
                    model.gradient.copy_(future.gradient(model.weights, self.poison(batch, context)))
                optimiser.step()
                step += 1
            if step == before:
                raise RunError("there is no batch to train on: the client has no examples")
            epoch += 1
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
            context.metrics["anticipate_peak_bytes"] = float(torch.cuda.max_memory_allocated(model.device))
        context.metrics["anticipate_saved_bytes"] = float(meter.peak)
        context.metrics["anticipate_seconds"] = time.perf_counter() - started


class _Future:
    """The next k rounds of the federation, as the attacker imagines them."""

    def __init__(self, parameters: AnticipateParameters, context: AttackContext) -> None:
        self.parameters, self.context = parameters, context
        self.module, self.device = context.model.module, context.model.device
        self.entries = [entry for entry in context.model.layout.entries if entry.trainable]
        self.sizes = [entry.size for entry in self.entries]
        self.start = context.global_weights
        self.steps = parameters.benign_epochs or context.benign.epochs
        self.clients = parameters.clients or context.clients_per_round
        # running statistics for the simulation to spoil: in training mode they influence no output
        self.buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        self.running: Iterator[Batch] = iter(())
        # cuDNN's recurrent layers cannot be differentiated twice
        self.plain_rnn = (
            self.device.type == "cuda"
            and parameters.second_order
            and any(isinstance(layer, nn.RNNBase) for layer in self.module.modules())
        )

    def gradient(self, attacker: Tensor, poisoned: Batch) -> Tensor:
        """∂L/∂θ_a (T,) at ``attacker`` (T,)."""
        n, boost = self.clients, self.parameters.simulate_boost or 1.0
        attacker = attacker.detach().requires_grad_()
        own = self._clip((attacker - self.start) * boost)
        others = self._simulate(self.start, self._clean_batch(), 0, differentiable=False) - self.start
        mixed = self.start + (own + (n - 1) * others) / n

        points, pullbacks = [mixed.detach()], []
        for j in range(1, self.parameters.k):
            point, pullback = self._round(points[-1], j)
            points.append(point)
            pullbacks.append(pullback)
        adjoint = self._slope(points[-1], poisoned)
        for point, pullback in zip(reversed(points[:-1]), reversed(pullbacks), strict=True):
            adjoint = pullback(adjoint) + self._slope(point, poisoned)
        return torch.autograd.grad(mixed, attacker, adjoint)[0]

    def _round(self, before: Tensor, j: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """θ_j from θ_{j−1}, and the map λ ↦ (∂Sim_j/∂θ)ᵀ λ."""
        batch = self._clean_batch()
        if not self.parameters.second_order:
            return self._simulate(before, batch, j, differentiable=False), lambda adjoint: adjoint
        before = before.requires_grad_()
        if not self.parameters.checkpoint:
            after = self._simulate(before, batch, j, differentiable=True)
            return after.detach(), lambda adjoint: torch.autograd.grad(after, before, adjoint)[0]

        stream = random_state(self.device)

        def again(adjoint: Tensor) -> Tensor:
            with stream():
                repeated = self._simulate(before, batch, j, differentiable=True)
            return torch.autograd.grad(repeated, before, adjoint)[0]

        return self._simulate(before, batch, j, differentiable=True).detach(), again

    def _simulate(self, weights: Tensor, batch: Batch, j: int, *, differentiable: bool) -> Tensor:
        """Sim_j: the weights (T,) after a simulated round of the honest clients."""
        lr = self.context.benign.lr * self.context.benign.lr_decay**j
        current = weights
        for _ in range(self.steps):
            if not differentiable:
                current = current.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._loss(current, batch), current, create_graph=differentiable)
            current = current - lr * slope
        result = weights + self._clip(current - weights) if self.parameters.simulate_clip else current
        return result if differentiable else result.detach()

    def _slope(self, weights: Tensor, batch: Batch) -> Tensor:
        """Gradient (T,) of the loss at ``weights``."""
        leaf = weights.detach().requires_grad_()
        return torch.autograd.grad(self._loss(leaf, batch), leaf)[0]

    def _loss(self, weights: Tensor, batch: Batch) -> Tensor:
        """The loss on a batch as a function of the flat weights (T,)."""
        settings, inputs = self.context.settings, batch.inputs
        if settings.channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        pieces = torch.split(weights, self.sizes)
        named = {entry.name: piece.view(entry.shape) for entry, piece in zip(self.entries, pieces, strict=True)}
        with contextlib.ExitStack() as stack:
            if settings.amp:
                stack.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16))
            if self.plain_rnn:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            outputs = functional_call(self.module, {**named, **self.buffers}, (inputs,))
            value: Tensor = self.context.loss(outputs, batch.labels)
        return value

    def _clip(self, update: Tensor) -> Tensor:
        """``update`` (T,) scaled to norm S at most; differentiable, also at zero."""
        bound = self.parameters.simulate_clip
        if bound is None:
            return update
        norm: Tensor = torch.linalg.vector_norm(update)
        return update * (bound / norm.clamp_min(bound))

    def _clean_batch(self) -> Batch:
        if self.parameters.simulation_batch == "first":
            return next(self.context.batches())
        batch = next(self.running, None)
        if batch is None:
            self.running = self.context.batches()
            batch = next(self.running)
        return batch
