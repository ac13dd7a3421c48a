"""From texts to a corpus, for every source of text: order and limits by author, splits, and what is checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.data import Corpus, Texts
from fedsim.errors import InputError
from fedsim.tasks.installed import held_out


def by_user(texts: Texts, when: NDArray[Any] | None = None) -> Texts:
    """The texts sorted by user, then by ``when`` (N,), then as they were; without users by ``when`` alone."""
    keys = [] if texts.users is None else [texts.users.numpy()]
    if when is not None:
        keys.insert(0, when)
    return texts.subset(torch.from_numpy(np.lexsort(keys))) if keys else texts


def of_length(texts: Texts, min_words: int | None, max_words: int | None, name: str) -> Texts:
    """The texts of users who wrote ``min_words`` words or more, of each the first ones, up to ``max_words``.

    texts: sorted by user; without users all are one author's. Words are separated by white space. The text in
    which a user reaches ``max_words`` is the last one that is kept, whole.

    Raises
    ------
    InputError: nobody wrote ``min_words`` words.
    """
    if (min_words is None and max_words is None) or len(texts) == 0:
        return texts
    words = np.array([len(text.split()) for text in texts.texts])
    first, counts = _blocks(texts)
    total = np.add.reduceat(words, first)
    before = np.cumsum(words) - words
    before -= np.repeat(before[first], counts)
    keep = np.repeat(total >= (min_words or 0), counts)
    if not keep.any():
        raise InputError(
            f"task.data, {name}: nobody wrote {min_words} words, the most is {total.max()}; lower min_words"
        )
    if max_words is not None:
        keep &= before < max_words
    return texts.subset(torch.from_numpy(np.flatnonzero(keep)))


def split_by_time(texts: Texts, fraction: float) -> tuple[Texts, Texts]:
    """(train, test): the last ``fraction`` of every user's texts, rounded, is for testing, but never all of them.

    texts: sorted by user, then time; without users all are one author's.
    """
    first, counts = _blocks(texts)
    held = np.minimum(np.rint(fraction * counts), counts - 1)
    place = np.arange(len(texts)) - np.repeat(first, counts)
    return _divided(texts, place >= np.repeat(counts - held, counts))


def split_by_user(texts: Texts, fraction: float, rng: np.random.Generator) -> tuple[Texts, Texts]:
    """(train, test): a random ``fraction`` of the users, rounded, is for testing, with all of their texts."""
    assert texts.users is not None
    users = np.unique(texts.users.numpy())
    held = rng.permutation(users)[: round(fraction * len(users))]
    return _divided(texts, np.isin(texts.users.numpy(), held))


def split_by_label(texts: Texts, fraction: float, rng: np.random.Generator) -> tuple[Texts, Texts]:
    """(train, test): a random ``fraction`` of every class, rounded, is for testing.

    Training texts that equal a test text, but for case and outer white space, are left out.
    """
    assert texts.labels is not None
    train, test = _divided(texts, held_out(texts.labels, fraction, rng).numpy())
    known = {_bare(text) for text in test.texts}
    return train.subset(torch.tensor([i for i, t in enumerate(train.texts) if _bare(t) not in known]).long()), test


def _blocks(texts: Texts) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where every user's texts begin, and how many there are."""
    users = np.zeros(len(texts), np.int64) if texts.users is None else texts.users.numpy()
    _, first, counts = np.unique(users, return_index=True, return_counts=True)
    return first, counts


def _divided(texts: Texts, test: NDArray[np.bool_]) -> tuple[Texts, Texts]:
    return (
        texts.subset(torch.from_numpy(np.flatnonzero(~test))),
        texts.subset(torch.from_numpy(np.flatnonzero(test))),
    )


def _bare(text: str) -> str:
    return text.strip().lower()


def refuse_negative(texts: Texts, what: str) -> None:
    """Raises InputError if there is a negative label."""
    if texts.labels is not None and len(texts) and int(texts.labels.min()) < 0:
        raise InputError(f"{what} has a negative label")


def make_corpus(
    train: Texts,
    test: Texts,
    source: dict[str, Any],
    classes: int | None = None,
    names: tuple[str, ...] = (),
) -> Corpus:
    """Check a pair of sets of texts and count their classes.

    classes: number of classes; None: as many as there are labels, which then have no gaps. names: of the classes.

    Raises
    ------
    InputError: an empty set, a negative label, one beyond the classes, or labels with gaps.
    """
    name = f"task.data, {source.get('name', 'data')}"
    for part, texts in (("training", train), ("test", test)):
        if len(texts) == 0:
            raise InputError(f"{name}: the {part} set is empty")
        refuse_negative(texts, f"{name}: the {part} set")
    if train.labels is None or test.labels is None:
        return Corpus(train, test, 0, source)
    there = torch.unique(torch.cat([train.labels, test.labels])).tolist()
    if classes is None and there != list(range(len(there))):
        raise InputError(
            f"{name}: the labels are {', '.join(map(str, there[:10]))}; number the classes from 0 without gaps, or "
            f"say how many there are in task.data.classes"
        )
    if classes is None and len(there) < 2:
        raise InputError(f"{name}: every label is 0; there must be two classes or more")
    if classes is not None and there[-1] >= classes:
        raise InputError(f"{name}: a label is {there[-1]}, but there are {classes} classes (labels count from 0)")
    return Corpus(train, test, classes or len(there), source, names)
