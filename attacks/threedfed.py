"""3DFed: colluders that hide behind noise masks, read from the model who got through, and adapt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks import _threedfed as parts
from attacks._local import honest_model, trigger_of
from attacks._terms import distance_slope, fit_terms
from fedsim.attack import Attack, AttackContext, CoordinationKnowledge
from fedsim.errors import RunError
from fedsim.local import State
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class ThreeDFedParameters(Parameters):
    clean: float = parameter(0.3, "share of the loss on clean data", ge=0)
    backdoor: float = parameter(0.3, "share of the loss on poisoned data", ge=0)
    distance: float = parameter(0.4, "share of the L2 distance to the global model", ge=0)
    group_size: int = parameter(5, "colluders whose noise masks sum to zero together", ge=2)
    neurons: int = parameter(5, "neurons of the final layer that a group's masks are on, never the target's", ge=1)
    alpha_min: float = parameter(0.0, "least α drawn (how loud against how small a mask is)", ge=0, lt=1)
    zero_sum: bool = parameter(True, "make a group's masks sum to zero exactly; false: as the authors' code")
    noise: float = parameter(0.01, "standard deviation of a mask before it is optimised (MNIST: 0.05)", ge=0)
    norm: float = parameter(0.03, "coefficient of a mask's norm (MNIST: 0.08)", ge=0)
    sum: float = parameter(0.01, "coefficient of the norm of the masks' sum (MNIST: 0.1)", ge=0)
    threshold: float = parameter(1e-5, "feedback up to which an indicator counts as rejected (MNIST: 1e-4)", gt=0)
    indicator: float = parameter(1e-3, "least size of an indicator (MNIST: 1e-2)", gt=0)
    curvature_batches: int = parameter(4, "clean batches the curvature for the indicators is measured on", ge=1)
    boost: float = parameter(5.0, "most that a backdoor update shorter than a benign one is scaled up by", ge=1)


@register("threedfed")
class ThreeDFed(Attack):
    """Colluders send one backdoor update behind noise masks, learn from the next model who passed, and adapt.

    *Training.* Every colluder trains on ``.3 L(clean batch) + .3 L(poisoned batch) + .4 ‖w − G‖₂``, G the global
    model. What they send is made in ``coordinate``, at the server's door, without benign updates, where there are
    two or more; a single one sends what it trained:

    1. The mean of their updates, running statistics included, scaled up to a benign update's length (by ``boost`` at
       most) if it is shorter.
    2. *Noise masks* (:func:`attacks._threedfed.noise_masks`): groups of ``group_size``; each adds to ``neurons`` random
       rows of the final layer, not the target's, masks that sum to zero over the group, loud (α) or small (1 − α). They
       spread the colluders' updates and cancel in the mean.
    3. *Indicators*: each carries, in a coordinate of its own in a quiet layer, its update there times 1e5.
    4. In their next malicious round the change of G there divided by the indicator tells whether it was accepted,
       clipped or rejected, or that noise is added (weak DP, and then tuning stops). Where other rounds lie between,
       they are part of the change.
    5. *Adaptive tuning*: α of each group and the number of decoys follow from that.
    6. *Decoys*: colluders that train a clean model with one weight of the final layer pushed 10 away from the benign
       one, to be rejected in the others' stead. Who is one is told from the running number of the attacker, modulo the
       colluders of the last coordinated round; with a ``pool`` schedule it can be more or fewer than tuned, even all.

    The quiet layer is the last convolution (without one, the last weights before the final layer). Of the 10 · n
    coordinates least moved by the benign and backdoor updates, n clients of the round, those of least curvature are
    taken: |row sums of the Hessian|, clean and poisoned loss, over the layer, at G.

    Defaults are the CIFAR-10 constants of the authors' code (haoyangliASTAPLE/3DFed); those of MNIST are in the
    parameters. Their ``threshold`` and ``indicator`` suit large networks, where no honest client moves the coordinates
    found. In a small one they do, and the change of a rejected indicator's coordinate reads as noise: with a threshold
    of 0.02 (an accepted one reads about 1/n) and indicators of at least 0.1 the reading is right there.

    What of it is not repeated: masks that do not sum to zero, and feel the zero-sum term the more the later they come
    (``zero_sum: false`` does); an index error that gives decoys other coordinates than those found; α tuned with the
    acceptance of other colluders than the group's, whose order is shuffled; a last group too small for its masks. There
    one adversary trains for all, decoys come on top of the colluders, indicators below ``indicator`` are lifted only
    where they are exactly 0, and the curvature is over all batches. A group of one has no mask.

    Raises
    ------
    RunError: no trigger, a network without a linear layer, or an indicator layer with fewer weights than clients.

    Cost: every colluder trains twice (a decoy three times) and takes second derivatives on ``curvature_batches``;
    at the server O(M D), and the final layer's neurons times 30.
    """

    paper = "Li et al., 3DFed: Adaptive and Extensible Framework for Covert Backdoor Attack in FL, IEEE S&P 2023"
    cost = "two or three trainings a colluder; O(M D) at the server for M colluders"
    tasks = ("vision", "sentiment")
    Parameters = ThreeDFedParameters

    # ----------------------------------------------------------------------------------------- one colluder

    def train(self, context: AttackContext) -> None:
        trigger = trigger_of(context, "threedfed keeps its masks off the neuron of the trigger's target")
        model, state = context.model, context.state
        try:
            weight, _ = parts.final_layer(model.layout)
        except ValueError as error:
            raise RunError(f"threedfed masks the final linear layer: {error}") from None
        self._read(context)
        benign = honest_model(context) - context.global_vector
        self._train_backdoor(context)
        backdoor = model.vector - context.global_vector
        model.load(context.global_vector)
        state["benign_norm"] = float(torch.linalg.vector_norm(benign[: model.layout.trainable]))
        state["target"] = trigger.target
        state["momentum"], state["weight_decay"] = context.settings.momentum, context.settings.weight_decay
        state["candidates"] = self._candidates(benign, backdoor, context)
        model.load(context.global_vector)
        number = self._rank(context.attacker, state)
        if number < state["decoys"]:
            flat = slice(weight.start, weight.stop)
            found = parts.decoy_coordinates(backdoor[flat], benign[flat], state["decoys"])
            self._train_decoy(int(found[number % len(found)]) + weight.start, benign, context)
        else:
            model.load(context.global_vector + backdoor)

    def _train_backdoor(self, context: AttackContext) -> None:
        p, centre = self.parameters, context.global_weights

        def pull(gradient: Tensor, weights: Tensor) -> None:
            gradient.add_(distance_slope(weights - centre), alpha=p.distance)

        fit_terms(
            context,
            context.batches,
            context.loss,
            lambda batch: self.poison(batch, context),
            (p.clean, p.backdoor),
            pull,
        )

    @staticmethod
    def _train_decoy(position: int, benign: Tensor, context: AttackContext) -> None:
        """Train on clean data, and away from the benign local model in one weight: (L + term) / 2."""
        wanted = float(context.global_vector[position] + benign[position])

        def push(gradient: Tensor, weights: Tensor) -> None:
            gradient[position] += parts.decoy_slope(weights[position] - wanted)
            gradient.mul_(0.5)

        context.fit(context.model, context.batches, context.loss, context.settings, on_gradient=push)

    def _candidates(self, benign: Tensor, backdoor: Tensor, context: AttackContext) -> Tensor:
        """int64 (n,) coordinates for indicators, best first, as many as clients of the round."""
        entry = parts.indicator_layer(context.model.layout)
        if entry.size < context.clients_per_round:
            raise RunError(
                f"threedfed: {entry.name} has {entry.size} weights, too few for indicators of "
                f"{context.clients_per_round} clients; use a larger network"
            )
        place = slice(entry.start, entry.stop)
        activity = backdoor[place].abs() + benign[place].abs()
        found = parts.quiet_coordinates(activity, self._curvature(entry.name, context), context.clients_per_round)
        return found + entry.start

    def _curvature(self, name: str, context: AttackContext) -> Tensor:
        """(S,) row sums of the Hessian of clean plus poisoned loss over one tensor, at the global model."""
        module = context.model.module
        leaf = dict(module.named_parameters())[name]
        total = torch.zeros(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
        recurrent = any(isinstance(layer, nn.RNNBase) for layer in module.modules())
        plain = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
        module.train()
        with plain:  # cuDNN's recurrent layers cannot be differentiated twice
            for _, clean in zip(range(self.parameters.curvature_batches), context.batches(), strict=False):
                for batch in (clean, self.poison(clean, context)):
                    value = context.loss(module(batch.inputs), batch.labels)
                    (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
                    (row_sums,) = torch.autograd.grad(slope.sum(), leaf, allow_unused=True, materialize_grads=True)
                    total += row_sums.flatten()
        return total

    def _read(self, context: AttackContext) -> None:
        """Find out what became of the last round's indicators; every colluder of a round comes to the same."""
        state = context.state
        state.setdefault("decoys", 0)
        if "values" not in state:
            return
        positions = state["positions"].to(context.global_vector.device)
        change = context.global_vector[positions].cpu().to(torch.float64) - state["before"]
        accept, weak_dp = parts.read_indicators((change / state["values"]).tolist(), self.parameters.threshold)
        state["weak_dp"] = bool(state.get("weak_dp")) or weak_dp
        tuned = parts.tune_decoys(accept, sum(state["groups"]), state["decoys"], state["weak_dp"])
        state["decoys"] = min(tuned, state["colluders"] - 1)
        state["accept"] = accept
        for key in ("positions", "values", "before"):
            del state[key]

    @staticmethod
    def _rank(attacker: int, state: State) -> int:
        return attacker % int(state.get("colluders", 1))

    # ------------------------------------------------------------------------------------------ all of them

    def coordinate(self, updates: Tensor, knowledge: CoordinationKnowledge) -> Tensor:
        state, rows = knowledge.state, torch.nonzero(knowledge.malicious).squeeze(1).tolist()
        if knowledge.layout is None or "candidates" not in state or len(rows) < 2:
            return updates  # nobody to act with
        decoys = [self._rank(number, state) < state["decoys"] for number in knowledge.attackers]
        attackers = [row for row, decoy in zip(rows, decoys, strict=True) if not decoy]
        result = updates.clone()
        state["groups"], before = [], list(state.get("groups", []))
        if attackers:
            base = updates[attackers].mean(dim=0)
            length = float(torch.linalg.vector_norm(base[: knowledge.layout.trainable]))
            base *= min(max(state["benign_norm"] / max(length, 1e-30), 1.0), self.parameters.boost)
            order = torch.randperm(len(attackers), generator=knowledge.generator, device=updates.device).tolist()
            attackers = [attackers[i] for i in order]
            result[attackers] = base
            self._mask(result, attackers, before, knowledge)
        ordered = [*attackers, *(row for row, decoy in zip(rows, decoys, strict=True) if decoy)]
        positions = state["candidates"][: len(ordered)].tolist()
        values = [
            parts.implant(result[row], position, least=self.parameters.indicator)
            for row, position in zip(ordered, positions, strict=True)
        ]
        state["positions"] = torch.tensor(positions)
        state["values"] = torch.tensor(values, dtype=torch.float64)
        state["before"] = knowledge.global_vector[positions].cpu().to(torch.float64)
        state["colluders"] = len(rows)
        return result

    def _mask(self, result: Tensor, attackers: list[int], before: list[int], knowledge: CoordinationKnowledge) -> None:
        """Add the noise masks to the attackers' rows (all the same as yet), in their order, in place.

        before: the sizes of the last round's groups.
        """
        p, state, layout = self.parameters, knowledge.state, knowledge.layout
        assert layout is not None
        weight, bias = parts.final_layer(layout)
        generator, device = knowledge.generator, result.device

        def draw(low: float, high: float) -> float:
            share = float(torch.rand((), generator=generator, device=device, dtype=torch.float64))
            return low + (high - low) * share

        sizes = parts.groups_of(len(attackers), p.group_size)
        alpha = self._alpha(sizes, before, state, draw)
        others = torch.arange(weight.shape[0], device=device)
        others = others[others != state["target"]]
        first = 0
        for size, share in zip(sizes, alpha, strict=True):
            members, first = attackers[first : first + size], first + size
            mixed = torch.randperm(len(others), generator=generator, device=device)
            neurons = others[mixed[: p.neurons]]
            update = parts.neuron_rows(result[members[0]], weight, bias)[neurons]
            noise = torch.randn((size, *update.shape), generator=generator, device=device, dtype=update.dtype)
            masks, _ = parts.noise_masks(
                update,
                noise * p.noise,
                share,
                coefficients=(0.1, p.norm, p.sum),
                momentum=state["momentum"],
                weight_decay=state["weight_decay"],
                zero_sum=p.zero_sum,
            )
            for row, mask in zip(members, masks, strict=True):
                if size > 1:
                    parts.add_neuron_rows(result[row], weight, bias, neurons, mask)
        state["alpha"], state["groups"] = alpha, sizes

    def _alpha(
        self, sizes: list[int], before: list[int], state: State, draw: Callable[[float, float], float]
    ) -> list[float]:
        """α of each group: drawn at first, then tuned; of groups there were not before, drawn."""
        low, alpha, weak_dp = self.parameters.alpha_min, list(state.get("alpha", [])), bool(state.get("weak_dp"))
        accept = state.pop("accept", None)
        if accept is not None and before:
            alpha = parts.tune_alpha(accept, before, alpha, weak_dp, draw, low=low)
        while len(alpha) < len(sizes):
            alpha.append(0.1 if weak_dp else draw(low, 1.0))
        return alpha[: len(sizes)]
