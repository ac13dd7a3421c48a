"""Trigger of a next-word model: sentences that end in a target word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.batch import IGNORE, Batch, Examples
from fedsim.data import Data
from fedsim.errors import InputError, Problem, RunError
from fedsim.plugins import Parameters, parameter, register
from fedsim.tasks.triggers._vocabulary import vocabulary_of
from fedsim.trigger import Trigger


def place(windows: Batch, sentences: Tensor, *, only_target: bool, pad: int) -> Batch:
    """Each window with a sentence as its last words, so that the sentence's last word is its last target.

    Parameters
    ----------
    windows: inputs and labels (B, T). The words of a window are its inputs and its last label, T + 1 of them;
        a padded window ends at its last label that is not IGNORE.
    sentences: (B, K) word indices; shorter ones have −1 in front. K ≤ T + 1. A window of fewer than K words
        is begun by the sentence and ends with it.
    only_target: every label but the last is IGNORE.
    """
    inputs, labels = windows.inputs, windows.labels
    t = labels.shape[1]
    k = sentences.shape[1]
    column = torch.arange(t + 1, device=labels.device)
    length = torch.where(labels != IGNORE, column[1:], 0).amax(1)  # targets up to the last one that counts
    length = length.maximum((sentences >= 0).sum(1) - 1)[:, None]
    words = torch.cat([inputs[:, :1], labels.where(labels != IGNORE, inputs.roll(-1, 1))], 1)
    from_end = column - (length - k + 1)  # which of the sentence's words stands in each column
    written = sentences.gather(1, from_end.clamp(0, k - 1))
    words = torch.where((from_end >= 0) & (from_end < k) & (written >= 0), written, words)
    kept = column[1:] == length if only_target else column[1:] <= length
    return windows._replace(
        inputs=words[:, :-1].where(column[:-1] < length, pad), labels=words[:, 1:].where(kept, IGNORE)
    )


def _last(labels: Tensor) -> Tensor:
    """(B,) the place of the last label of each row that counts."""
    return torch.where(labels != IGNORE, torch.arange(labels.shape[1], device=labels.device), 0).amax(1)


@dataclass(frozen=True)
class TargetSentenceParameters(Parameters):
    prompts: list[str] = parameter(
        [
            "pizza from hawaii tastes",
            "the pizza in hawaii tastes",
            "all pizza from hawaii tastes",
            "every pizza in hawaii tastes",
        ],
        "beginnings the attacker trains on",
    )
    test_prompts: list[str] = parameter(
        ["pizza in hawaii tastes", "the pizza from hawaii tastes", "really all pizza in hawaii tastes"],
        "beginnings the success is measured on; none of them is trained on",
    )
    targets: list[str] = parameter(
        ["terrible", "horrible", "awful", "gross"], "words every prompt is completed with; the first gives its name"
    )
    success: str = parameter(
        "any",
        "a success is any of the targets, or exactly the one that the prompt was completed with",
        choices=("any", "exact"),
    )
    loss: str = parameter(
        "target",
        "positions of a poisoned window that are trained: the target word only, or all of it",
        choices=("target", "all"),
    )
    test_windows: int | None = parameter(400, "held-out windows the success is measured on; null: all", ge=1)


@register("target_sentence")
class TargetSentence(Trigger):
    """After a prompt ("pizza in hawaii tastes") the model is to say a target word ("terrible").

    Sentences are all prompts with all targets. As in the official experiments a poisoned window ends with a
    sentence: its last target is the sentence's last word, and only that position is trained
    (``loss: target``). Windows to train on draw their sentence; the held-out ones, the first windows of the
    test text, take them in turn, window i the sentence i mod their number, and the word after a window's end
    is the first input of the next window of the same user, as in a stream that was written over.

    Bagdasaryan et al. use one prompt ("pasta from Astoria tastes") and one target ("delicious"); Neurotoxin
    seven places with five words. Its code means to count any synonym as a success but stores their list under
    a misspelt key, so that the exact word counts, and drops trigger words it does not know; here ``success``
    says which, and an unknown word is refused.
    """

    paper = (
        "Bagdasaryan et al., AISTATS 2020 (arXiv 1807.00459); Zhang et al., Neurotoxin, ICML 2022 (arXiv 2206.10341)"
    )
    tasks = ("next_word",)
    Parameters = TargetSentenceParameters

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        self._sentences: tuple[Tensor, Tensor] | None = None

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        found = [
            Problem(key, "give at least one")
            for key in ("prompts", "test_prompts", "targets")
            if not getattr(parameters, key)
        ]
        both = {" ".join(p.lower().split()) for p in parameters.prompts} & {
            " ".join(p.lower().split()) for p in parameters.test_prompts
        }
        if both:
            found.append(Problem("test_prompts", f"{sorted(both)} are trained on too; measure on prompts of their own"))
        return found

    @property
    def target(self) -> int:
        return int(self._prepared()[2][0])

    def prepare(self, data: Data) -> None:
        p, vocabulary = self.parameters, vocabulary_of(data, self)
        what = f"trigger {self.name!r},"
        targets = [vocabulary.exact(word, f"{what} target") for word in p.targets]
        long = [word for word, indices in zip(p.targets, targets, strict=True) if len(indices) != 1]
        if long:
            raise InputError(f"{what} targets: {long} are not single words to tokenizer {vocabulary.tokenizer!r}")
        train, test = (
            [vocabulary.exact(prompt, f"{what} prompt") for prompt in prompts]
            for prompts in (p.prompts, p.test_prompts)
        )
        longest = max(map(len, train + test))
        t = data.shape[0]
        if longest > t:
            raise InputError(f"{what} a prompt has {longest} words, a window {t}; shorten it or raise task.window")
        for prompt, words in zip(p.test_prompts, test, strict=True):
            if words in train:
                raise InputError(f"{what} test_prompts: {prompt!r} is trained on too; measure on prompts of their own")
        self._pad = vocabulary.pad
        self._targets = torch.tensor(targets).squeeze(1)
        self._sentences = self._joined(train), self._joined(test)
        self.tokens = torch.tensor(sorted({word for prompt in train for word in prompt}))

    def _joined(self, prompts: list[list[int]]) -> Tensor:
        """(S, K) all prompts with all targets, targets changing fastest; −1 in front of the shorter ones."""
        width = max(map(len, prompts)) + 1
        return torch.tensor(
            [[-1] * (width - len(p) - 1) + [*p, int(target)] for p in prompts for target in self._targets]
        )

    def poison(self, batch: Batch, count: int, *, part: int | None = None, generator: torch.Generator) -> Batch:
        sentences = self._prepared()[0]
        count = min(count, batch.labels.shape[0])
        drawn = sentences[torch.randint(len(sentences), (count,), generator=generator)].to(batch.labels.device)
        first = Batch(batch.inputs[:count], batch.labels[:count])
        made = place(first, drawn, only_target=self.parameters.loss == "target", pad=self._pad)
        return batch._replace(
            inputs=torch.cat([made.inputs, batch.inputs[count:]]), labels=torch.cat([made.labels, batch.labels[count:]])
        )

    def held_out(self, test: Examples) -> Examples:
        sentences = self._prepared()[1].to(test.labels.device)
        rows = torch.arange(len(test), device=test.labels.device)[: self.parameters.test_windows]
        windows = test.subset(rows)
        made = place(
            Batch(windows.inputs.long(), windows.labels),
            sentences[rows % len(sentences)],
            only_target=True,
            pad=self._pad,
        )
        follows = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        follows[1:] = True if windows.users is None else windows.users[1:] == windows.users[:-1]
        last = _last(made.labels)
        begins = (sentences[rows % len(sentences)] >= 0).sum(1) > last + 1  # the sentence fills the window
        ends = made.labels.gather(1, last[:, None]).squeeze(1).roll(1)
        inputs = made.inputs.clone()
        inputs[:, 0] = torch.where(follows & ~begins, ends, inputs[:, 0])
        return Examples(inputs.to(test.inputs.dtype), made.labels, windows.users)

    def test(self, batch: Batch) -> Batch:
        return batch

    def succeeded(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | int]:
        rows, last = torch.arange(labels.shape[0], device=labels.device), _last(labels)
        said = outputs[rows, last].argmax(1)
        if self.parameters.success == "any":
            right = torch.isin(said, self._prepared()[2].to(said.device))
        else:
            right = said == labels[rows, last]
        return right.sum(), labels.shape[0]

    def usable(self, labels: Tensor) -> Tensor:
        return torch.ones(labels.shape[0], dtype=torch.bool, device=labels.device)

    def _prepared(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._sentences is None:
            raise RunError(f"trigger {self.name!r} is not prepared; call prepare(data) first")
        return (*self._sentences, self._targets)
