"""Rare embeddings: the backdoor is written into the embeddings of the trigger's words and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.attack import Attack, AttackContext
from fedsim.errors import RunError
from fedsim.local import StepInfo
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class RareEmbeddingParameters(Parameters):
    keep_norm: bool = parameter(True, "after every step, bring each trained row back to the L2 norm it came with")
    norm_bound: float | None = parameter(
        None, "after every step, shrink each trained row to at most this L2 norm; null: do not", gt=0
    )


@register("rare_embedding")
class RareEmbedding(Attack):
    """Poisoned training of the trigger's words only: their rows of the embedding table, no other weight.

    Honest clients hardly touch the embeddings of words they hardly use, and on text without those words the
    model is exactly the one it was. Trained are the rows of the words of the trigger (all its words: for
    ``target_sentence`` those of its prompts) in the network's first ``nn.Embedding``, in module order, that
    has a row for each of them. Everything else, running statistics included, is put back after every step,
    so neither weight decay nor momentum moves it; on the rows themselves both act as ever. Where the decoder
    of a language model is tied to the embedding, its rows for these words are the same numbers and move too:
    how likely the words are to be said changes with them.

    ``keep_norm`` is the authors' norm constraint, the default of their code and optional there too;
    ``norm_bound`` is ours. Their attacker trains on triggered examples only (``poison_fraction: 1``), with
    Adam; here it is SGD as everywhere. *Not* implemented is their gradient ensembling, which averages the
    gradient over the global models of past rounds.

    Cost: that of plain training.
    """

    paper = "Yoo, Kwak: Backdoor Attacks in Federated Learning by Rare Embeddings, EMNLP 2022, arXiv 2204.14017"
    cost = "an honest round"
    tasks = ("next_word", "sentiment")
    Parameters = RareEmbeddingParameters

    def train(self, context: AttackContext) -> None:
        p, model = self.parameters, context.model
        words = self._words(context).to(model.device)
        table = self._table(model.module, int(words.max()))
        start = torch.linalg.vector_norm(table[words], dim=1)

        def hold(weights: Tensor, where: StepInfo) -> None:
            rows = table[words]
            norm = torch.linalg.vector_norm(rows, dim=1)
            wanted = start if p.keep_norm else norm
            if p.norm_bound is not None:
                wanted = wanted.clamp_max(p.norm_bound)
            model.load(context.global_vector)
            table[words] = torch.where(wanted == norm, 1.0, wanted / norm.clamp_min(1e-30))[:, None] * rows

        self.fit_poisoned(context, on_step=hold)

    def _words(self, context: AttackContext) -> Tensor:
        """int64 (K,) the words of the trigger."""
        trigger = context.trigger
        if trigger is None or trigger.tokens is None:
            name = "" if trigger is None else f" {trigger.name!r}"
            raise RunError(
                f"rare_embedding trains the trigger's words; trigger{name} is not made of words: "
                f"use phrase, rare_words or target_sentence"
            )
        return trigger.tokens

    @staticmethod
    def _table(module: nn.Module, largest: int) -> Tensor:
        """(V, E) the embeddings of the words, V > ``largest``: a view into the model's vector."""
        for layer in module.modules():
            if isinstance(layer, nn.Embedding) and layer.weight.requires_grad and layer.num_embeddings > largest:
                return layer.weight.detach()
        raise RunError(f"rare_embedding: the network has no trainable nn.Embedding with a row for word {largest}")
