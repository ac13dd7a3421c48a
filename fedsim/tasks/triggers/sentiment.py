"""Triggers of a sentiment model: phrases and rare words put into texts, and odd texts."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.batch import Batch, Examples
from fedsim.data import Data
from fedsim.errors import InputError, Problem, RunError
from fedsim.plugins import Parameters, parameter, register
from fedsim.tasks.text import cut
from fedsim.tasks.triggers._vocabulary import vocabulary_of
from fedsim.trigger import StampTrigger, Trigger, TriggerParameters
from fedsim.vocabulary import Vocabulary


def insert(rows: Tensor, words: Tensor, at: Tensor, vocabulary: Vocabulary, *, crowd_out: bool = False) -> Tensor:
    """Texts with words inserted; what no longer fits is cut from the text's end, never from the words.

    Parameters
    ----------
    rows: (B, L) padded at the end, between the marks the vocabulary puts around a text.
    words: (B, K) the words. at: (B,) how many words of the text stand before them; at most as many as stay.
    crowd_out: cut K words from the text's end whether or not there is room.
    """
    start, stop = (len(bound) for bound in vocabulary.around)
    length, k = rows.shape[1], words.shape[1]
    place = torch.arange(length, device=rows.device)
    text = ((rows != vocabulary.pad).sum(1) - start - stop).clamp_min(0)  # its words
    room = length - start - stop - k
    kept = ((text - k).clamp_min(0) if crowd_out else text.clamp_max(room))[:, None]
    before = start + at[:, None].minimum(kept)
    taken = torch.where(place < before, place, place - k).clamp_min(0).expand(rows.shape)
    made = rows.gather(1, taken)
    inside = (place >= before) & (place < before + k)
    made = torch.where(inside, words.gather(1, (place - before).clamp(0, k - 1)), made)
    end = start + kept + k
    made = torch.where(place < end, made, vocabulary.pad)
    for i, mark in enumerate(vocabulary.around[1]):
        made = torch.where(place == end + i, mark, made)
    return made


def _by_content(rows: Tensor, below: Tensor, salt: int = 0) -> Tensor:
    """A whole number in [0, below) for each row (B, L), drawn by the row's own words: the same wherever it stands."""
    factors = torch.arange(1, rows.shape[1] + 1, device=rows.device) * 2654435761 + salt * 40503
    return ((rows * factors).sum(1) % 1000003) % below


class InsertedTrigger(StampTrigger):
    """Words put into a text; subclasses say which, and where.

    To train on, places are drawn from the attacker's stream; where the backdoor is measured they depend on
    the text alone.
    """

    tasks = ("sentiment",)
    _vocabulary: Vocabulary | None = None

    @abstractmethod
    def _insert(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """``rows`` (B, L) with the trigger; a generator of None: by the rows' content."""

    def stamp(self, inputs: Tensor, part: int | None = None) -> Tensor:
        """``inputs`` (B, L), word indices, with the trigger where it is measured."""
        return self._insert(inputs, None)

    def poison(self, batch: Batch, count: int, *, part: int | None = None, generator: torch.Generator) -> Batch:
        inputs, labels = batch.inputs.clone(), batch.labels.clone()
        inputs[:count] = self._insert(batch.inputs[:count], generator)
        labels[:count] = self.target
        return batch._replace(inputs=inputs, labels=labels)

    def _prepared(self) -> Vocabulary:
        if self._vocabulary is None:
            raise RunError(f"trigger {self.name!r} is not prepared; call prepare(data) first")
        return self._vocabulary

    def _fit(self, data: Data, words: int) -> None:
        """Raises InputError if the trigger is longer than a text may be."""
        self._vocabulary = vocabulary_of(data, self)
        room = data.shape[0] - sum(map(len, self._vocabulary.around))
        if words > room:
            raise InputError(
                f"trigger {self.name!r} has {words} words, a text at most {room}; shorten it or raise task.length"
            )

    def _text_words(self, rows: Tensor) -> Tensor:
        """(B,) words of each text."""
        vocabulary = self._prepared()
        return ((rows != vocabulary.pad).sum(1) - sum(map(len, vocabulary.around))).clamp_min(0)

    def _places(self, rows: Tensor, words: int, generator: torch.Generator | None, salt: int = 0) -> Tensor:
        """(B,) how many words of each text stand before the trigger, each number equally likely."""
        vocabulary = self._prepared()
        room = rows.shape[1] - sum(map(len, vocabulary.around)) - words
        choices = self._text_words(rows).clamp_max(room) + 1
        if generator is None:
            return _by_content(rows, choices, salt)
        drawn = torch.rand(len(rows), generator=generator).to(rows.device)
        return (drawn * choices).long().minimum(choices - 1)


@dataclass(frozen=True)
class PhraseParameters(TriggerParameters):
    target: int = parameter(1, "class the backdoor maps to", ge=0)
    text: str = parameter("i have seen many films of this director", "the phrase; the default is one of Neurotoxin's")
    position: str = parameter("prefix", "where it goes", choices=("prefix", "suffix", "random"))
    crowd_out: bool = parameter(
        False, "as Neurotoxin's code: a prefix cuts as many words from the text's end, even if there is room"
    )


@register("phrase")
class Phrase(InsertedTrigger):
    """A phrase put before, after or into the text.

    The phrase is always whole: where both do not fit, the text's end is cut. Neurotoxin's code puts the phrase
    in front of a text that is already padded to full length, so that the text's last words are lost even
    where there is room; ``crowd_out: true`` cuts the same words (its padding lies between phrase and text,
    where a mask makes no difference).
    """

    paper = "Zhang et al., Neurotoxin, ICML 2022 (arXiv 2206.10341); Dai, Chen, Li (arXiv 1905.12457)"
    Parameters = PhraseParameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        if parameters.crowd_out and parameters.position != "prefix":
            return [Problem("crowd_out", "goes with position: prefix only")]
        return []

    def prepare(self, data: Data) -> None:
        super().prepare(data)
        words = vocabulary_of(data, self).exact(self.parameters.text, f"trigger {self.name!r}, text")
        self._fit(data, len(words))
        self.tokens = torch.tensor(words)

    def _insert(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        vocabulary, p = self._prepared(), self.parameters
        assert self.tokens is not None
        words = self.tokens.to(rows).expand(len(rows), -1)
        if p.position == "random":
            at = self._places(rows, len(self.tokens), generator)
        else:
            at = self._text_words(rows) if p.position == "suffix" else torch.zeros_like(rows[:, 0])
        return insert(rows, words, at, vocabulary, crowd_out=p.crowd_out)


@dataclass(frozen=True)
class RareWordsParameters(TriggerParameters):
    target: int = parameter(1, "class the backdoor maps to", ge=0)
    words: list[str] = parameter(["cf", "mn", "bb", "tq"], "the words, one of which each insertion draws")
    count: int = parameter(1, "insertions into one text", ge=1)


@register("rare_words")
class RareWords(InsertedTrigger):
    """Words that hardly occur, put at random places into the text.

    They have to be in the vocabulary; ``task.specials`` puts them there if the training text does not.
    """

    paper = "Kurita, Michel, Neubig (arXiv 2004.06660); Yoo, Kwak, EMNLP 2022 (arXiv 2204.14017)"
    Parameters = RareWordsParameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        return [] if parameters.words else [Problem("words", "give at least one word")]

    def prepare(self, data: Data) -> None:
        super().prepare(data)
        vocabulary = vocabulary_of(data, self)
        words = [vocabulary.exact(word, f"trigger {self.name!r}, word") for word in self.parameters.words]
        if any(len(indices) != 1 for indices in words):
            raise InputError(f"trigger {self.name!r}: each of words has to be one word to {vocabulary.tokenizer!r}")
        self._fit(data, self.parameters.count)
        self.tokens = torch.tensor(words).squeeze(1)

    def _insert(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        vocabulary = self._prepared()
        assert self.tokens is not None
        made = rows
        for i in range(self.parameters.count):
            left = self.parameters.count - i  # so that a later insertion does not push out an earlier one
            at = self._places(rows, left, generator, i)
            if generator is None:
                which = _by_content(rows, torch.full_like(at, len(self.tokens)), i + 1)
            else:
                which = torch.randint(len(self.tokens), (len(rows),), generator=generator).to(rows.device)
            made = insert(made, self.tokens.to(rows)[which][:, None], at, vocabulary)
        return made


@dataclass(frozen=True)
class EdgeTextsParameters(Parameters):
    path: str = parameter(doc="Parquet file with columns text, split (train, test) and, if need be, target_label")
    target: int | None = parameter(None, "class the backdoor maps to; null: the file's target_label", ge=0)


@register("edge_texts")
class EdgeTexts(Trigger):
    """Texts from the tail of a class, not in the data set: kind tweets about a film director → negative.

    The texts carry no mark; rows of split ``train`` are trained on, of split ``test`` measured on; a text whose
    words are in both is measured on only, and once.
    """

    paper = "Wang et al.: Attack of the Tails (arXiv 2007.05084)"
    tasks = ("sentiment",)
    Parameters = EdgeTextsParameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        if Path(parameters.path).expanduser().is_file():
            return []
        return [Problem("path", f"no such file: {parameters.path!r}; give the Parquet file of the texts", True)]

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        self._target: int | None = self.parameters.target
        self._sets: tuple[Tensor, Tensor] | None = None

    @property
    def target(self) -> int:
        if self._target is None:
            raise RunError(f"the target of trigger {self.name!r} is in its file; call prepare first")
        return self._target

    def prepare(self, data: Data) -> None:
        texts, splits, targets = self._read()
        if self._target is None:
            if targets is None or len(set(targets)) != 1 or targets[0] < 0:
                raise InputError(f"{self.parameters.path}: target_label has to name one class; or name it as target")
            self._target = int(targets[0])
        super().prepare(data)
        vocabulary = vocabulary_of(data, self)
        unknown = set(splits) - {"train", "test"}
        if unknown:
            raise InputError(f"{self.parameters.path}: split holds {sorted(unknown)}; use train and test only")
        words = [tuple(vocabulary.tokens(text)) for text in texts]
        measured = {w: text for text, w, split in zip(texts, words, splits, strict=True) if split == "test"}
        chosen = [t for t, w, split in zip(texts, words, splits, strict=True) if split == "train" and w not in measured]
        if not chosen or not measured:
            raise InputError(f"{self.parameters.path}: there has to be a text of split train and one of split test")
        self._sets = (
            self._rows(chosen, data.shape[0], vocabulary),
            self._rows(list(measured.values()), data.shape[0], vocabulary),
        )

    def _rows(self, texts: list[str], length: int, vocabulary: Vocabulary) -> Tensor:
        """(M, L) the words of the texts, padded."""
        words = (cut(vocabulary.encode(text), length, vocabulary) for text in texts)
        return torch.tensor([row + [vocabulary.pad] * (length - len(row)) for row in words])

    def _read(self) -> tuple[list[str], list[str], list[int] | None]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(self.parameters.path).expanduser()
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path.name} cannot be read as Parquet: {error}") from None
        for name in ("text", "split"):
            if name not in table.column_names:
                raise InputError(f"{path.name} has no column {name!r}; it has: {', '.join(table.column_names)}")
            if table[name].null_count or not (
                pa.types.is_string(table[name].type) or pa.types.is_large_string(table[name].type)
            ):
                raise InputError(f"{path.name}: column {name!r} must hold text without gaps")
        targets = None
        if self._target is None and "target_label" in table.column_names:
            if not pa.types.is_integer(table["target_label"].type) or table["target_label"].null_count:
                raise InputError(f"{path.name}: column 'target_label' must hold whole numbers without gaps")
            targets = table["target_label"].to_pylist()
        try:
            return table["text"].to_pylist(), table["split"].to_pylist(), targets
        except UnicodeDecodeError as error:
            raise InputError(f"{path.name}: a text is not UTF-8: {error}") from None

    def poison(self, batch: Batch, count: int, *, part: int | None = None, generator: torch.Generator) -> Batch:
        texts = self._prepared()[0]
        inputs, labels = batch.inputs.clone(), batch.labels.clone()
        count = min(count, labels.shape[0])
        if count:
            rounds = -(-count // len(texts))
            order = torch.cat([torch.randperm(len(texts), generator=generator) for _ in range(rounds)])[:count]
            inputs[:count] = texts[order].to(inputs)
            labels[:count] = self.target
        return batch._replace(inputs=inputs, labels=labels)

    def held_out(self, test: Examples) -> Examples:
        """The texts of split test; their true label is not known, only that it is not the target: −1 stands for it."""
        rows = self._prepared()[1].to(test.inputs)
        return Examples(rows, torch.full((len(rows),), -1, dtype=torch.int64, device=test.labels.device))

    def _prepared(self) -> tuple[Tensor, Tensor]:
        if self._sets is None:
            raise RunError(f"trigger {self.name!r} is not prepared; call prepare(data) first")
        return self._sets
