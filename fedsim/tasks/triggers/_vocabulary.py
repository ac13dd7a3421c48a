"""What all triggers of words need: the vocabulary of the data."""

from __future__ import annotations

from fedsim.data import Data
from fedsim.errors import InputError
from fedsim.trigger import Trigger
from fedsim.vocabulary import Vocabulary


def vocabulary_of(data: Data, trigger: Trigger) -> Vocabulary:
    """The vocabulary of the data.

    Raises
    ------
    InputError: the data is not text.
    """
    if data.vocabulary is None:
        raise InputError(f"trigger {trigger.name!r} is made of words; the data {data.source.get('name')!r} is not text")
    return data.vocabulary
