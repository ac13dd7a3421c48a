"""The text tasks: words in windows and rows, what is padded, what is carried, and what is counted."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim import plugins
from fedsim.batch import IGNORE, Batch, Examples, Recurrent, State, outputs_of
from fedsim.config import load_config
from fedsim.data import Corpus, Data, Texts
from fedsim.errors import ConfigError, InputError
from fedsim.federation.evaluation import Evaluator, Measurement
from fedsim.layout import FlatModel
from fedsim.local import LocalSettings
from fedsim.tasks.text import NextWord, Sentiment, WordLoss, cut
from fedsim.training import fit
from fedsim.vocabulary import PAD, SPECIALS, UNKNOWN, Vocabulary

UNK = SPECIALS.index(UNKNOWN)


def next_word(**values: Any) -> NextWord:
    made: NextWord = plugins.create("task", "next_word", **{"min_count": 1, **values})
    return made


def sentiment(**values: Any) -> Sentiment:
    made: Sentiment = plugins.create("task", "sentiment", **{"min_count": 1, **values})
    return made


def corpus(train: Texts, test: Texts | None = None, classes: int = 0) -> Corpus:
    return Corpus(train, train if test is None else test, classes, {"name": "made"})


def texts_of(*texts: str, users: list[int] | None = None, labels: list[int] | None = None) -> Texts:
    return Texts(
        texts,
        None if labels is None else torch.tensor(labels),
        None if users is None else torch.tensor(users),
    )


def sentences(count: int, words: int = 9, seed: int = 0) -> tuple[str, ...]:
    draw = random.Random(seed)
    return tuple(" ".join(draw.choices([f"w{i}" for i in range(12)], k=words)) for _ in range(count))


def vocabulary_of(data: Data) -> Vocabulary:
    assert data.vocabulary is not None
    return data.vocabulary


def streams_of(examples: Examples, vocabulary: Vocabulary) -> dict[int, list[str]]:
    """Every user's words, as they are predicted; asserts that inputs are the words before, and padding the rest."""
    users = torch.zeros(len(examples), dtype=torch.int64) if examples.users is None else examples.users
    streams: dict[int, list[str]] = {}
    for user in dict.fromkeys(users.tolist()):
        inputs, labels = examples.inputs[users == user], examples.labels[users == user]
        assert (torch.diff((users == user).nonzero().squeeze(1)) == 1).all()  # one block
        counted = labels != IGNORE
        assert counted[:-1].all()  # only the last window is padded,
        assert counted[-1].any()
        assert (counted[-1].int().diff() <= 0).all()  # at its end
        before, after = inputs[counted].tolist(), labels[counted].tolist()
        assert before == [vocabulary.end, *after[:-1]]
        assert (inputs[~counted] == vocabulary.pad).all()
        streams[user] = [vocabulary.words[i] for i in after]
    return streams


# --------------------------------------------------------------------------------------------- windows


def test_windows_by_hand():
    data = next_word(window=3, tokenizer="split").encode(corpus(texts_of("a b", "", "c d e")))
    vocabulary = vocabulary_of(data)
    assert vocabulary.words == (*SPECIALS, "a", "b", "c", "d", "e")
    pad, eos = vocabulary.pad, vocabulary.end
    a, b, c, d, e = (vocabulary.numbers[word] for word in "abcde")
    assert data.train.inputs.tolist() == [[eos, a, b], [eos, c, d], [e, pad, pad]]
    assert data.train.labels.tolist() == [[a, b, eos], [c, d, e], [eos, IGNORE, IGNORE]]
    assert data.train.inputs.dtype == torch.int32
    assert data.train.labels.dtype == torch.int64
    assert data.train.users is None
    assert data.classes == len(vocabulary) == 8
    assert data.shape == (3,)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), min_size=1, max_size=12),
    window=st.integers(1, 9),
)
def test_every_word_of_every_user_is_predicted_once(lengths, window):
    """(user, number of words) of each text, in any order; a text without words leaves nothing."""
    draw = random.Random(1)
    texts = [" ".join(draw.choices("abcdefg", k=length)) for _, length in lengths]
    users = [user for user, _ in lengths]
    if not any(texts):
        return
    task = next_word(window=window, tokenizer="split")
    data = task.encode(corpus(texts_of(*texts, users=users)))
    wanted: dict[int, list[str]] = {}
    for text, user in zip(texts, users, strict=True):
        if text:
            wanted.setdefault(user, []).extend([*text.split(), "<eos>"])
    found = streams_of(data.train, vocabulary_of(data))
    assert found == wanted
    assert list(found) == list(wanted)  # users in the order of their first text
    assert data.train.inputs.shape[1] == window
    assert len(data.train) == sum(-(-len(words) // window) for words in wanted.values())


def test_one_word_is_a_window():
    data = next_word(window=5, tokenizer="split").encode(corpus(texts_of("hello")))
    assert streams_of(data.train, vocabulary_of(data)) == {0: ["hello", "<eos>"]}
    assert len(data.train) == 1
    assert next_word(window=1, tokenizer="split").encode(corpus(texts_of("hello"))).train.inputs.tolist() == [[2], [3]]


@pytest.mark.parametrize("empty", ["", "   ", "\n\t"])
@pytest.mark.parametrize("tokenizer", ["split", "basic_english"])
def test_a_text_without_words_leaves_nothing_and_neither_does_its_user(empty, tokenizer):
    texts = texts_of(empty, "a b", empty, "c", empty, users=[4, 2, 2, 7, 7])
    data = next_word(window=4, tokenizer=tokenizer).encode(corpus(texts))
    assert streams_of(data.train, vocabulary_of(data)) == {2: ["a", "b", "<eos>"], 7: ["c", "<eos>"]}


def test_any_language_and_a_very_long_text():
    words = ["naïve", "😀", "日本語", "тест", "e\u0301", "👩‍👩‍👧", "ß"]
    long = " ".join(words * 3000)
    data = next_word(window=64, tokenizer="split").encode(corpus(texts_of(long)))
    assert streams_of(data.train, vocabulary_of(data)) == {0: [*words * 3000, "<eos>"]}
    assert len(data.train) == -(-(21_000 + 1) // 64)
    plain = next_word(tokenizer="basic_english").encode(corpus(texts_of("Naïve 😀, 日本語!")))
    assert streams_of(plain.train, vocabulary_of(plain)) == {0: ["naïve", "😀", ",", "日本語", "!", "<eos>"]}


def test_the_vocabulary_is_of_the_training_text_only():
    train, test = texts_of("a a b b c"), texts_of("a zebra b c")
    for task in (next_word(tokenizer="split", min_count=2), next_word(tokenizer="split", vocabulary=2)):
        data = task.encode(corpus(train, test))
        assert vocabulary_of(data).words == (*SPECIALS, "a", "b")
        assert streams_of(data.test, vocabulary_of(data)) == {0: ["a", "<unk>", "b", "<unk>", "<eos>"]}
    both = [replace(texts, labels=torch.tensor([1])) for texts in (train, test)]
    data = sentiment(tokenizer="split", length=4).encode(corpus(*both, classes=2))
    assert "zebra" not in vocabulary_of(data)
    assert data.test.inputs.tolist() == [[3, UNK, 4, 5]]


def test_special_words_are_held_though_no_text_has_them():
    data = next_word(tokenizer="split", min_count=2, specials=["rare"]).encode(corpus(texts_of("a a b")))
    assert vocabulary_of(data).words == (*SPECIALS, "rare", "a")


def test_what_is_learnt_tells_one_data_set_from_another():
    made = [
        task.encode(corpus(texts_of(text))).fingerprint
        for task in (next_word(tokenizer="split"), next_word(tokenizer="split", window=7))
        for text in ("a b c", "a b d", "a c b")
    ]
    assert len(set(made)) == 6
    assert made[0] == next_word(tokenizer="split").encode(corpus(texts_of("a b c"))).fingerprint


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (("", " "), ("a",), "no word occurs 1 times or more"),
        (("a b",), ("", " "), "no word in the test texts"),
        ((), ("a",), "no word occurs"),
    ],
)
def test_nothing_to_learn_or_to_test_is_refused(train, test, message):
    with pytest.raises(InputError, match=message):
        next_word(tokenizer="split").encode(corpus(texts_of(*train), texts_of(*test)))


def test_text_whose_words_are_all_too_rare_is_refused():
    with pytest.raises(InputError, match="task 'next_word': no word occurs 3 times or more in the training text"):
        next_word(min_count=3).encode(corpus(texts_of("a b c a b")))


# --------------------------------------------------------------------------------------- loss and counts


def random_outputs(rows: int = 4, length: int = 5, words: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn((rows, length, words), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, words, (rows, length), generator=generator)
    padded = torch.arange(length) >= torch.tensor([[5], [3], [1], [4]])[:rows]
    return outputs, labels.masked_fill(padded, IGNORE)


def test_word_loss_is_the_mean_cross_entropy_of_what_counts():
    outputs, labels = random_outputs()
    for each in (labels, labels.clamp_min(0)):
        ours, theirs = outputs.clone().requires_grad_(), outputs.clone().requires_grad_()
        loss = WordLoss()(ours, each)
        expected = nn.CrossEntropyLoss()(theirs.flatten(0, 1), each.flatten())
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
        loss.backward()
        expected.backward()
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert (ours.grad[each == IGNORE] == 0).all()


def test_word_loss_of_nothing_is_zero():
    outputs, labels = random_outputs()
    outputs.requires_grad_()
    loss = WordLoss()(outputs, torch.full_like(labels, IGNORE))
    assert float(loss.detach()) == 0
    loss.backward()
    assert outputs.grad is not None
    assert (outputs.grad == 0).all()


def test_counts_by_hand():
    """Four predictions count: two are right, one says <unk> where <unk> is the word, one is wrong."""
    labels = torch.tensor([[3, UNK, IGNORE], [4, 3, IGNORE]])
    said = torch.tensor([[3, UNK, 3], [4, UNK, 4]])
    outputs = F.one_hot(said, 6).float() * 2
    counts = next_word().count(outputs, labels)
    assert int(counts.right) == 2
    assert int(counts.total) == 4
    partition = math.log(math.exp(2) + 5)
    assert float(counts.loss) == pytest.approx(4 * partition - 3 * 2, rel=1e-6)
    assert counts.by_class is None
    assert counts.loss.dtype == torch.float64


def test_unknown_is_never_a_right_answer():
    labels = torch.full((3, 4), UNK)
    counts = next_word().count(F.one_hot(labels, 5).float(), labels)
    assert (int(counts.right), int(counts.total)) == (0, 12)
    other = labels + 1
    assert int(next_word().count(F.one_hot(other, 5).float(), other).right) == 12


def test_counts_of_nothing():
    outputs, labels = random_outputs()
    counts = next_word().count(outputs, torch.full_like(labels, IGNORE))
    assert (int(counts.right), float(counts.loss), int(counts.total)) == (0, 0, 0)


@pytest.mark.parametrize("name", ["lstm_lm", "transformer_lm"])
def test_padding_counts_in_nothing(name):
    """Whatever padded inputs hold, and however many padded positions and rows there are."""
    task = next_word()
    sizes = {"hidden": 6} if name == "lstm_lm" else {"heads": 2}
    torch.manual_seed(0)
    model = plugins.create("model", name, embedding=6, layers=1, dropout=0.0, **sizes)
    module = model.build(11, 12, 0).double()
    inputs = torch.tensor([[2, 5, 6, 7], [2, 9, 0, 0], [2, 0, 0, 0]])
    labels = torch.tensor([[5, 6, 7, 2], [9, 2, IGNORE, IGNORE], [8, IGNORE, IGNORE, IGNORE]])

    def measured(inputs: Tensor, labels: Tensor) -> tuple[list[float], list[Tensor]]:
        module.zero_grad()
        outputs = module(inputs)
        loss = task.loss()(outputs, labels)
        loss.backward()
        counts = task.count(outputs.detach(), labels)
        numbers = [float(loss.detach()), float(counts.loss), int(counts.right), int(counts.total)]
        return numbers, [p.grad.clone() for p in module.parameters() if p.grad is not None]

    expected, gradients = measured(inputs, labels)
    assert expected[3] == 7
    variants = []
    for value in (1, 4, 10):
        variants.append((torch.where((labels == IGNORE), value, inputs), labels))
    wider = [F.pad(inputs, (0, 6)), F.pad(labels, (0, 6), value=IGNORE)]
    variants.append((wider[0], wider[1]))
    variants.append((F.pad(inputs, (0, 0, 0, 5)), F.pad(labels, (0, 0, 0, 5), value=IGNORE)))
    variants.append((torch.randint(1, 11, (8, 4)), F.pad(labels, (0, 0, 0, 5), value=IGNORE)))
    variants[-1][0][:3] = inputs
    for other_inputs, other_labels in variants:
        found, theirs = measured(other_inputs, other_labels)
        assert found == pytest.approx(expected, rel=1e-6)
        for ours, wanted in zip(theirs, gradients, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def test_fit_weighs_batches_by_what_counts():
    """The mean loss it returns is per word."""
    outputs, labels = random_outputs()

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, rows: Tensor) -> Tensor:
            return outputs[rows[:, 0]] + self.weight

    batches = [Batch(torch.tensor([[0], [1]]), labels[:2]), Batch(torch.tensor([[2], [3]]), labels[2:])]
    found = fit(FlatModel(Constant()), lambda: iter(batches), WordLoss(), LocalSettings(lr=0.0))
    assert found == pytest.approx(float(WordLoss()(outputs, labels)), rel=1e-6)


# --------------------------------------------------------------------------------------- order and carry


def numbered(count: int, users: list[int] | None = None) -> Examples:
    """Windows of one word, which is their number."""
    return Examples(
        torch.arange(count, dtype=torch.int32)[:, None],
        torch.arange(count)[:, None],
        None if users is None else torch.tensor(users),
    )


def rows_of(batches: Iterator[Batch]) -> tuple[list[list[int]], list[list[bool]]]:
    """The windows of each batch, and which of them go on."""
    made = list(batches)
    return (
        [batch.inputs[:, 0].tolist() for batch in made],
        [[] if batch.carried is None else batch.carried.tolist() for batch in made],
    )


def epochs(
    examples: Examples, rows: Tensor, columns: int, count: int = 1, seed: int = 0, **values: Any
) -> list[tuple[list[list[int]], list[list[bool]]]]:
    generator = torch.Generator().manual_seed(seed)
    batches = next_word(**values).epoch(examples, rows, columns, generator, False)
    return [rows_of(batches()) for _ in range(count)]


def columns_of(rows: list[list[int]]) -> list[list[int]]:
    """The windows of each column, top to bottom."""
    return [[batch[c] for batch in rows if c < len(batch)] for c in range(len(rows[0]))]


def test_order_and_carrying_by_hand():
    """Ten windows in three columns: 0–3, 4–7 and 8, 9; window 6 is another user's."""
    (walk,) = next_word().passes(numbered(10, [0] * 6 + [1] * 4), 3)
    rows, carried = rows_of(walk())
    assert rows == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]
    assert carried == [[False, False, False], [True, True, True], [True, False], [True, True]]
    (walk,) = next_word().passes(numbered(10), 3)
    assert rows_of(walk())[1] == [[False] * 3, [True] * 3, [True, True], [True, True]]


@given(
    count=st.integers(1, 40),
    columns=st.integers(1, 12),
    seed=st.integers(0, 5),
    borders=st.sets(st.integers(1, 39), max_size=4),
    gaps=st.sets(st.integers(0, 39), max_size=6),
)
def test_an_epoch_goes_through_every_window_once_and_in_order(count, columns, seed, borders, gaps):
    owner, users = 0, []
    for row in range(count):
        owner += row in borders
        users.append(owner)
    rows = [row for row in range(count) if row not in gaps] or [0]
    for known in (True, False):
        examples = numbered(count, users if known else None)
        ((found, carried),) = epochs(examples, torch.tensor(rows), columns, seed=seed)
        assert sorted(row for batch in found for row in batch) == rows
        sizes = [len(batch) for batch in found]
        assert sizes[0] <= columns
        assert sizes == sorted(sizes, reverse=True)
        assert len(found) == -(-len(rows) // columns)  # as many steps as batches of that size
        flat = [row for column in columns_of(found) for row in column]
        turned = rows.index(flat[0])
        assert flat == rows[turned:] + rows[:turned]  # the columns side by side are the stream, begun elsewhere
        assert not any(carried[0])
        for column, goes_on in zip(columns_of(found), columns_of(carried), strict=True):
            for (a, b), flag in zip(pairwise(column), goes_on[1:], strict=True):
                assert flag == (b == a + 1 and (not known or users[a] == users[b]))


def test_epochs_begin_at_different_places():
    found = epochs(numbered(30), torch.arange(30), 4, count=12)
    firsts = [rows[0][0] for rows, _ in found]
    assert len(set(firsts)) > 6
    assert all(sorted(row for batch in rows for row in batch) == list(range(30)) for rows, _ in found)
    assert found == epochs(numbered(30), torch.arange(30), 4, count=12)
    assert found != epochs(numbered(30), torch.arange(30), 4, count=12, seed=1)
    everywhere = {epochs(numbered(5), torch.arange(5), 2, seed=s)[0][0][0][0] for s in range(60)}
    assert everywhere == set(range(5))


def test_the_end_of_the_stream_is_not_carried_into_its_beginning():
    for seed in range(10):
        ((rows, carried),) = epochs(numbered(6), torch.arange(6), 1, seed=seed)
        flat, flags = [row[0] for row in rows], [flag[0] for flag in carried]
        assert flags == [i > 0 and flat[i] != 0 for i in range(6)]


def test_windows_that_do_not_follow_each_other_are_not_carried():
    """As an IID partition deals them."""
    ((rows, carried),) = epochs(numbered(40), torch.arange(0, 40, 2), 3)
    assert len(rows) == 7
    assert not any(flag for batch in carried for flag in batch)


def test_without_carrying_windows_are_shuffled():
    found = epochs(numbered(40), torch.arange(10, 40), 8, count=3, carry=False)
    for rows, carried in found:
        assert carried == [[]] * 4
        assert [len(batch) for batch in rows] == [8, 8, 8, 6]
        flat = [row for batch in rows for row in batch]
        assert sorted(flat) == list(range(10, 40))
        assert sum(b == a + 1 for a, b in pairwise(flat)) < 6
    assert found[0] != found[1] != found[2]
    passes = next_word(carry=False).passes(numbered(10), 4)
    assert [rows_of(walk()) for walk in passes] == [
        ([[0, 1, 2, 3]], [[]]), ([[4, 5, 6, 7]], [[]]), ([[8, 9]], [[]]),
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 65, 200])
@pytest.mark.parametrize("columns", [1, 3, 8])
def test_passes_cover_every_window_once_and_restart(count, columns):
    passes = [rows_of(walk()) for walk in next_word().passes(numbered(count), columns)]
    assert sorted(row for rows, _ in passes for batch in rows for row in batch) == list(range(count))
    for rows, carried in passes:
        assert len(rows) <= 8
        assert max(map(len, rows)) <= columns
        assert not any(carried[0])
        assert all(all(flags) for flags in carried[1:])
        assert rows == rows_of(next_word().passes(numbered(count), columns)[passes.index((rows, carried))]())[0]


# ------------------------------------------------------------------------------------------ the state

WORDS = 15


class TinyLSTM(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.encoder = nn.Embedding(WORDS, 4)
            self.rnn = nn.LSTM(4, 5, num_layers=2, batch_first=True)
            self.decoder = nn.Linear(5, WORDS)
        self.double()

    def advance(self, inputs: Tensor, state: State | None) -> tuple[Tensor, State]:
        outputs, after = self.rnn(self.encoder(inputs), state)
        return self.decoder(outputs), after


def streams(lengths: list[int], window: int = 4, users: bool = True) -> Data:
    texts = [sentences(1, length, seed)[0] for seed, length in enumerate(lengths)]
    made = next_word(window=window, specials=[f"w{i}" for i in range(12)]).encode(
        corpus(texts_of(*texts, users=list(range(len(lengths))) if users else None))
    )
    assert made.classes == WORDS
    return made


def test_the_state_is_kept_where_a_row_goes_on_and_nowhere_else():
    module = TinyLSTM()
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(3, WORDS, (3, 4), generator=generator) for _ in range(2))
    flags = torch.tensor([False, True])
    with torch.no_grad():
        _, state = outputs_of(module, Batch(first, first, torch.zeros(3, dtype=torch.bool)), None)
        outputs, after = outputs_of(module, Batch(second[:2], second[:2], flags), state)
        anew = module(second[:1])
        whole = module(torch.cat([first[1:2], second[1:2]], 1))[:, 4:]
    assert state is not None
    assert after is not None
    torch.testing.assert_close(outputs, torch.cat([anew, whole]))
    assert [s.shape for s in after] == [(2, 2, 5), (2, 2, 5)]
    batch = Batch(second, second)
    ignored, nothing = outputs_of(module, batch, state)  # carried is None: every row begins anew
    torch.testing.assert_close(ignored, module(second))
    assert nothing is None


def test_the_state_is_detached():
    module = TinyLSTM()
    words = torch.randint(3, WORDS, (2, 4), generator=torch.Generator().manual_seed(0))
    _, state = outputs_of(module, Batch(words, words, torch.zeros(2, dtype=torch.bool)), None)
    assert state is not None
    assert not any(s.requires_grad for s in state)


@pytest.mark.parametrize("settings", [LocalSettings(lr=0.3, epochs=2), LocalSettings(lr=0.3, epochs=2, momentum=0.5)])
def test_training_with_carried_states_is_truncated_bptt(settings):
    """By hand: every column's stream in pieces, the state of each user handed on without its graph."""
    data = streams([21, 14])
    flat, by_hand = FlatModel(TinyLSTM()), TinyLSTM()
    task = next_word(window=4)
    batches = task.epoch(data.train, torch.arange(len(data.train)), 3, torch.Generator().manual_seed(7), False)
    found = fit(flat, batches, task.loss(), settings)

    optimiser = torch.optim.SGD(by_hand.parameters(), lr=settings.lr, momentum=settings.momentum)
    windows = list(zip(data.train.inputs.long(), data.train.labels, strict=True))
    assert data.train.users is not None
    users = data.train.users.tolist()
    generator = torch.Generator().manual_seed(7)
    for _ in range(settings.epochs):
        first = int(torch.randint(len(windows), (), generator=generator))
        order = [*range(first, len(windows)), *range(first)]
        steps = -(-len(order) // 3)
        columns = [order[i : i + steps] for i in range(0, len(order), steps)]
        states: list[State | None] = [None] * len(columns)
        total, seen = 0.0, 0
        for step in range(steps):
            losses, counted = [], 0
            for c, column in enumerate(columns):
                if step >= len(column):
                    continue
                row = column[step]
                if step == 0 or row != column[step - 1] + 1 or users[row] != users[row - 1]:
                    states[c] = None
                inputs, labels = windows[row]
                outputs, state = by_hand.advance(inputs[None], states[c])
                states[c] = tuple(s.detach() for s in state)
                losses.append(F.cross_entropy(outputs[0], labels, ignore_index=IGNORE, reduction="sum"))
                counted += int((labels != IGNORE).sum())
            optimiser.zero_grad()
            loss = torch.stack(losses).sum() / counted
            loss.backward()
            optimiser.step()
            total, seen = total + float(loss.detach()) * counted, seen + counted
    assert found == pytest.approx(total / seen, rel=1e-6)
    torch.testing.assert_close(flat.vector, FlatModel(by_hand).vector, rtol=1e-10, atol=1e-12)


def test_carrying_makes_a_difference():
    data = streams([40])
    vectors = []
    for carry in (True, False):
        flat, task = FlatModel(TinyLSTM()), next_word(window=4, carry=carry)
        (walk, *_) = task.passes(data.train, 1)
        batches = list(walk()) if carry else [b for w in task.passes(data.train, 1) for b in w()]
        fit(flat, lambda batches=batches: iter(batches[:5]), task.loss(), LocalSettings(lr=0.3))  # type: ignore[misc]
        vectors.append(flat.vector.clone())
    assert not torch.allclose(vectors[0], vectors[1])


def measured(data: Data, module: nn.Module, batch_size: int, threads: int = 1, **values: Any) -> Measurement:
    evaluator = Evaluator(next_word(**values), FlatModel(module), data, None, batch_size, threads)
    found = evaluator.measure(evaluator.model.vector.clone())
    assert found == evaluator.measure(evaluator.model.vector.clone())
    evaluator.close()
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_number_of_threads_changes_nothing(batch_size):
    data = streams([90, 3, 150, 41])
    found = [measured(data, TinyLSTM(), batch_size, threads) for threads in (1, 2, 5)]
    assert found[0] == found[1] == found[2], "to the last bit"


@pytest.mark.parametrize("length", [3, 14, 30, 31])
def test_one_column_is_one_long_sequence(length):
    """Up to eight windows of four words."""
    data = streams([length], users=False)
    assert len(data.test) <= 8
    found = measured(data, TinyLSTM(), 1)
    counted = data.test.labels.flatten() != IGNORE
    labels = data.test.labels.flatten()[counted]
    with torch.no_grad():
        outputs = TinyLSTM()(data.test.inputs.flatten()[counted][None].long())[0]
    assert len(labels) == length + 1
    assert found.main_loss == pytest.approx(float(F.cross_entropy(outputs, labels)), rel=1e-6)
    assert found.main_accuracy == pytest.approx(
        float(((outputs.argmax(1) == labels) & (labels != UNK)).double().mean())
    )
    assert found.perplexity == pytest.approx(math.exp(found.main_loss))
    assert found.class_accuracy is None


def test_two_users_are_two_sequences():
    data, lengths = streams([9, 13]), [10, 14]
    found = measured(data, TinyLSTM(), 1)
    total = 0.0
    assert data.test.users is not None
    for user, length in enumerate(lengths):
        rows = data.test.users == user
        counted = data.test.labels[rows].flatten() != IGNORE
        with torch.no_grad():
            outputs = TinyLSTM()(data.test.inputs[rows].flatten()[counted][None].long())[0]
        total += float(F.cross_entropy(outputs, data.test.labels[rows].flatten()[counted], reduction="sum"))
        assert int(counted.sum()) == length
    assert found.main_loss == pytest.approx(total / sum(lengths), rel=1e-6)


def test_without_carrying_every_window_begins_anew():
    data = streams([40])
    with torch.no_grad():
        expected = float(WordLoss()(TinyLSTM()(data.test.inputs.long()), data.test.labels))
    assert measured(data, TinyLSTM(), 3, carry=False).main_loss == pytest.approx(expected, rel=1e-6)
    assert measured(data, TinyLSTM(), 3).main_loss != pytest.approx(expected, rel=1e-6)


def test_a_network_without_a_state_counts_the_same_either_way():
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn((WORDS, WORDS), generator=torch.Generator().manual_seed(1)))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.table[inputs]

    data = streams([80, 33])
    found = [measured(data, Bigram(), size, carry=carry) for size in (1, 5, 100) for carry in (True, False)]
    assert len({m.main_accuracy for m in found}) == 1
    assert [m.main_loss for m in found] == pytest.approx([found[0].main_loss] * 6, rel=1e-6)


# ------------------------------------------------------------------------------------------- sentiment


def test_rows_by_hand():
    texts = texts_of("a b c", "", "c b a b c a", "b", labels=[1, 0, 2, 1], users=[5, 5, 6, 7])
    data = sentiment(tokenizer="split", length=4).encode(corpus(texts, classes=3))
    a, b, c = (vocabulary_of(data).numbers[word] for word in "abc")
    assert data.train.inputs.tolist() == [[a, b, c, 0], [0, 0, 0, 0], [c, b, a, b], [b, 0, 0, 0]]
    assert data.train.inputs.dtype == torch.int32
    assert data.train.labels.tolist() == [1, 0, 2, 1]
    assert data.train.users is not None
    assert data.train.users.tolist() == [5, 5, 6, 7]
    assert data.classes == 3
    assert data.shape == (4,)
    assert vocabulary_of(data).words[0] == PAD
    batch = sentiment().batch(data.train, torch.tensor([3, 0]))
    assert batch.inputs.tolist() == [[b, 0, 0, 0], [a, b, c, 0]]
    assert batch.inputs.dtype == torch.int64
    assert batch.labels.tolist() == [1, 1]
    assert batch.carried is None


@pytest.mark.parametrize(
    ("words", "length", "expected"),
    [
        ([5, 6], 6, [8, 5, 6, 9]),
        ([5, 6, 7, 5, 6, 7], 6, [8, 5, 6, 7, 5, 9]),
        ([5, 6, 7, 5], 6, [8, 5, 6, 7, 5, 9]),
        ([], 6, [8, 9]),
        ([5], 2, [8, 9]),
        ([5], 1, [8]),
    ],
)
def test_marks_stand_around_what_is_kept_of_a_text(words, length, expected):
    marked = Vocabulary((*SPECIALS, *"abcde", "[CLS]", "[SEP]"), bounds=(("[CLS]",), ("[SEP]",)))
    assert cut(words, length, marked) == expected
    assert cut(words, length, Vocabulary((*SPECIALS, *"abcde"))) == words[:length]


@pytest.mark.parametrize("part", ["train", "test"])
def test_texts_without_labels_are_refused(part):
    labelled, bare = texts_of("a b", labels=[1]), texts_of("a b")
    both = (bare, labelled) if part == "train" else (labelled, bare)
    wanted = "training" if part == "train" else "test"
    with pytest.raises(InputError, match=rf"the {wanted} texts have no labels; name their column in task\.data"):
        sentiment().encode(corpus(*both, classes=2))


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_set_is_refused(part):
    some, none = texts_of("a b", labels=[1]), Texts((), torch.tensor([], dtype=torch.int64))
    both = (none, some) if part == "train" else (some, none)
    with pytest.raises(InputError, match=rf"the {'training' if part == 'train' else 'test'} set is empty"):
        sentiment().encode(corpus(*both, classes=2))


def test_sentiment_is_counted_as_classes():
    outputs = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    counts = sentiment().count(outputs, torch.tensor([0, 0, 0]))
    assert int(counts.right) == 2
    assert counts.by_class is not None
    assert counts.by_class.tolist() == [[2, 0], [3, 0]]
    assert isinstance(sentiment().loss(), nn.CrossEntropyLoss)
    assert not sentiment().perplexity


# ------------------------------------------------------------------------------- what does not go together


def pictures() -> Data:
    images = Examples(torch.zeros((4, 1, 8, 8), dtype=torch.uint8), torch.arange(4))
    return Data(images, images, 10, (0.5,), (0.5,), {"name": "some pictures"}, "0")


@pytest.mark.parametrize("name", ["next_word", "sentiment"])
def test_pictures_are_refused(name):
    with pytest.raises(InputError, match=rf"task '{name}' learns from text; the data 'some pictures' holds images"):
        plugins.create("task", name).encode(pictures())


def test_text_is_refused_where_pictures_are_learnt():
    with pytest.raises(InputError, match="task 'vision' learns from images; the data 'made' is text"):
        plugins.create("task", "vision").encode(corpus(texts_of("a b", labels=[0]), classes=2))


CONFIGS: dict[str, dict[str, Any]] = {
    "next_word": {"name": "next_word", "data": "chitchat", "model": "lstm_lm"},
    "sentiment": {"name": "sentiment", "data": "movie_reviews", "model": "lstm_classifier"},
}


def problem_of(tiny: dict[str, Any], task: dict[str, Any], **training: Any) -> str:
    """What the config is refused for, on one line; empty if it is fine."""
    config = {**tiny, "task": task, "training": {**tiny["training"], **training}, "attack": None}
    try:
        load_config(config)
    except ConfigError as error:
        return " ".join(str(error).split())
    return ""


@pytest.mark.parametrize("name", CONFIGS)
def test_what_makes_no_sense_for_text_is_refused(name, tiny):
    task = CONFIGS[name]
    assert problem_of(tiny, task) == ""
    assert "training.augment crops and flips images; set it to false" in problem_of(tiny, task, augment=True)
    for tokenizer in ("basic_english", "split"):
        assert problem_of(tiny, {**task, "tokenizer": tokenizer}) == ""
    found = problem_of(tiny, {**task, "tokenizer": "moses"})
    assert f"task.tokenizer: 'moses' is not known to task '{name}'; use basic_english or split" in found
    assert "task.min_count" in problem_of(tiny, {**task, "min_count": 0})
    assert "task.vocabulary" in problem_of(tiny, {**task, "vocabulary": 0})
    assert problem_of(tiny, {**task, "vocabulary": None}) == ""
    size = "window" if name == "next_word" else "length"
    assert f"task.{size}" in problem_of(tiny, {**task, size: 0})
    other = "length" if name == "next_word" else "window"
    assert f"task.{other}" in problem_of(tiny, {**task, other: 5})


def test_a_pretrained_tokenizer_is_for_sentiment_only(tiny):
    assert "task.tokenizer" in problem_of(tiny, {**CONFIGS["next_word"], "tokenizer": "hf:bert-base-uncased"})
    assert "task.tokenizer" not in problem_of(tiny, {**CONFIGS["sentiment"], "tokenizer": "hf:bert-base-uncased"})
    assert "training.augment" in problem_of(tiny, {**CONFIGS["sentiment"], "tokenizer": "hf:x"}, augment=True)


# -------------------------------------------------------------------------------------------- describe


def test_next_word_described_by_hand():
    """Training words: a a b c(unknown) <eos>; test words: a d(unknown) b a <eos>."""
    task = next_word(window=3, tokenizer="split", vocabulary=2)
    data = task.encode(corpus(texts_of("a a b c"), texts_of("a d b a")))
    assert task.describe(data) == {
        "vocabulary": 5,
        "window": 3,
        "train_words": 5,
        "train_unknown_share": pytest.approx(1 / 5),
        "test_words": 5,
        "test_unknown_share": pytest.approx(1 / 5),
        "commonest_word": "a",
        "commonest_word_accuracy": pytest.approx(2 / 5),
    }


def test_the_commonest_word_is_not_unknown():
    task = next_word(tokenizer="split", min_count=2)
    data = task.encode(corpus(texts_of("a a b c d e f")))
    described = task.describe(data)
    assert described["train_unknown_share"] == pytest.approx(5 / 8)
    assert described["commonest_word"] == "a"
    assert described["commonest_word_accuracy"] == pytest.approx(2 / 8)


def test_sentiment_described_by_hand():
    task = sentiment(tokenizer="split", length=3, min_count=2)
    train = texts_of("a a b", "a", "c c c", labels=[1, 1, 0])
    test = texts_of("z a", "c", "y", "a a a a", labels=[0, 1, 0, 1])
    data = task.encode(Corpus(train, test, 2, {"name": "made"}, ("bad", "good")))
    assert data.names == ("bad", "good")
    assert task.describe(data) == {
        "vocabulary": 5,
        "length": 3,
        "train_unknown_share": pytest.approx(1 / 7),
        "test_unknown_share": pytest.approx(2 / 7),
        "commonest_class": "good",
        "commonest_class_accuracy": 0.5,
    }
    unnamed = task.encode(Corpus(train, replace(test, texts=("", "", "", "")), 2, {"name": "made"}))
    described = task.describe(unnamed)
    assert described["commonest_class"] == 1
    assert described["test_unknown_share"] is None


def test_encoding_leaves_the_corpus_as_it_is_and_is_the_same_every_time():
    raw = corpus(texts_of("a b", "c", users=[1, 0], labels=[0, 1]), classes=2)
    before = copy.deepcopy(raw)
    for task in (next_word(tokenizer="split"), sentiment(tokenizer="split")):
        first, again = task.encode(raw), task.encode(raw)
        assert first.fingerprint == again.fingerprint
        assert torch.equal(first.train.inputs, again.train.inputs)
    assert raw.train.texts == before.train.texts
    assert raw.train.labels is not None
    assert torch.equal(raw.train.labels, torch.tensor([0, 1]))


def test_shares_of_words_add_up():
    data = streams([50, 60])
    words = Counter(word for stream in streams_of(data.train, vocabulary_of(data)).values() for word in stream)
    described = next_word(window=4).describe(data)
    assert described["train_words"] == sum(words.values()) == 112
    assert described["commonest_word"] == max(words, key=lambda word: words[word])
