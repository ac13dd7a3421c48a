"""Neurotoxin: write the backdoor where honest clients do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attacks._local import sum_of_gradients
from attacks._projection import held_near
from fedsim.attack import Attack, AttackContext, Knowledge
from fedsim.batch import Batch
from fedsim.errors import RunError
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class NeurotoxinParameters(Parameters):
    ratio: float = parameter(
        0.95, "share of the coordinates the attacker may train, those of smallest gradient", gt=0, le=1
    )
    scope: str = parameter(
        "global", "rank all coordinates together, or within each tensor", choices=("global", "per_tensor")
    )
    source: str = parameter(
        "benign_data",
        "whose gradient ranks the coordinates",
        choices=("benign_data", "last_aggregate", "own_data"),
    )
    benign_clients: int = parameter(30, "benign_data: number of honest clients whose clean data is seen", ge=1)
    bound: float | None = parameter(
        None, "keep within this L2 distance of the global model, after every step; null: do not", gt=0
    )


@register("neurotoxin")
class Neurotoxin(Attack):
    """Poisoned training confined to the coordinates that honest clients move least.

    Let g be what honest clients do to the model. The ``int(T · ratio)`` coordinates of smallest |g| are
    trained, the gradient of the others is set to zero (algorithm 1 of the paper: projection onto the
    complement of the top-k of g, with k = 1 − ``ratio``).

    ``source`` says where g comes from:

    * ``benign_data`` (the authors' code, the default): the sum over all batches of the gradients of the mean
      loss, at the global model, on clean data of ``benign_clients`` honest clients. A strong assumption: see
      ``knowledge``.
    * ``last_aggregate`` (the paper): the update the server applied last. There is none before the first
      aggregation, and then the attack refuses rather than train without a mask: start the schedule at round
      2.
    * ``own_data``: as ``benign_data``, on the attacker's own clean data.

    ``scope: global`` is that of the authors' image and Reddit runs, ``per_tensor`` that of their Sentiment140
    and IMDB runs; there int() truncates in each tensor. As in their code the mask acts on the gradient,
    before weight decay and momentum, so that with weight decay masked weights still shrink. Their pass for g
    advances the running statistics of the global model by side effect; here they are put back.

    Embeddings of words that no honest client uses have the gradient zero and are thus among those that may be
    trained, as in their code; not so with a decoder tied to them, whose softmax reaches every word. The two
    biases of an LSTM's gate always tie. Ties are broken as ``torch.topk`` does.

    ``bound`` is the authors' PGD flag, off in all their released scripts: an L2 projection of the trainable
    weights. Their pass for g carries an LSTM's state from one honest client to the next; here each client
    begins anew.

    Cost: one gradient pass over the honest clients' data, then plain training.
    """

    paper = "Zhang et al., Neurotoxin, ICML 2022, arXiv 2206.10341; code: jhcknzzm/Federated-Learning-Backdoor"
    cost = "an honest round and a gradient pass over the benign clients' data"
    Parameters = NeurotoxinParameters
    knows = frozenset({Knowledge.OWN_DATA, Knowledge.BENIGN_DATA, Knowledge.LAST_AGGREGATE})

    @classmethod
    def knowledge(cls, parameters: Any) -> frozenset[Knowledge]:
        extra = {"benign_data": {Knowledge.BENIGN_DATA}, "last_aggregate": {Knowledge.LAST_AGGREGATE}}
        return frozenset({Knowledge.OWN_DATA} | extra.get(parameters.source, set()))

    def train(self, context: AttackContext) -> None:
        mask = self.mask(self.gradient(context), context)

        def keep_masked(gradient: Tensor, weights: Tensor) -> None:
            gradient.mul_(mask)

        hold = held_near(context.global_weights, self.parameters.bound)
        self.fit_poisoned(context, on_gradient=keep_masked, on_step=hold)

    def gradient(self, context: AttackContext) -> Tensor:
        """(T,) what honest clients do to the model, up to sign."""
        if self.parameters.source == "last_aggregate":
            if context.last_aggregate is None:
                raise RunError(
                    f"neurotoxin: nothing was aggregated before round {context.round}, so there is no mask; "
                    f"let the attack start a round later, or use source: benign_data or own_data"
                )
            return context.last_aggregate[: context.model.layout.trainable]
        return sum_of_gradients(context, lambda: self._clean(context))

    def _clean(self, context: AttackContext) -> Iterator[Batch]:
        if self.parameters.source == "own_data":
            return context.batches()
        if context.benign_batches is None:
            raise RunError("neurotoxin: this run gives no data of benign clients; use source: own_data")
        return context.benign_batches(self.parameters.benign_clients)

    def mask(self, gradient: Tensor, context: AttackContext) -> Tensor:
        """(T,) 1 where the attacker may train, 0 elsewhere."""
        size = gradient.abs()
        mask = torch.ones_like(size)
        if self.parameters.scope == "global":
            pieces = [slice(0, size.shape[0])]
        else:
            pieces = [slice(e.start, e.stop) for e in context.model.layout.entries if e.trainable]
        for piece in pieces:
            count = piece.stop - piece.start
            frozen = torch.topk(size[piece], count - int(count * self.parameters.ratio)).indices
            mask[piece][frozen] = 0.0
        return mask
