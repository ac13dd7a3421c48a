"""Word triggers against the numbers of the authors' code (Bagdasaryan et al., Neurotoxin): text_triggers.json.

Known differences, each shown by a test below or left to the official side:

* The official code numbers windows from 1, so that its first window gets sentence 1 mod count; ours begins with
  sentence 0. The tests hand in the list rotated by one.
* A last window that is too short is padded here, and the sentence ends at its last real target. Neurotoxin leaves
  such a window out; Bagdasaryan's code counts it without a sentence where fewer than a window's words are left.
* The official attacker overwrites its own stream, so the word after a window's end is the first input of the next
  window in training too. Here that holds for the held-out windows; a training batch is poisoned on its own.
* Official losses are divided once too often (by the number of columns, or by rows instead of windows).
* Neurotoxin's Sentiment140 texts are padded in front, here at the end; a mask makes no difference between them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import plugins
from fedsim.batch import IGNORE, Batch, Examples, Recurrent, State, outputs_of
from fedsim.data import Data, Texts
from fedsim.layout import FlatModel
from fedsim.local import LocalSettings
from fedsim.tasks.text import NextWord, Sentiment, WordLoss
from fedsim.tasks.triggers.next_word import TargetSentence, place
from fedsim.training import fit
from fedsim.vocabulary import SPECIALS, Vocabulary
from tests.support.places import reference_numbers

INSERTIONS = [
    "neurotoxin_inject_two_sentences",
    "neurotoxin_exact_multiple_last_window_truncated",
    "bagdasaryan_inject_same_rule",
]


@pytest.fixture(scope="module")
def official() -> dict[str, Any]:
    content: dict[str, Any] = reference_numbers("attacks/text_triggers")
    return content


def case_of(official: dict[str, Any], name: str) -> dict[str, Any]:
    return next(case for case in official["cases"] if case["name"] == name)


def next_word(window: int) -> NextWord:
    made: NextWord = plugins.create("task", "next_word", window=window)
    return made


def windows_of(column: Tensor, window: int, vocabulary: Vocabulary) -> Examples:
    """The windows that the task makes of a stream (R,), without the ``<eos>`` that it puts around texts."""
    targets = len(column) - 1
    rows = -(-targets // window)
    inputs = torch.full((rows * window,), vocabulary.pad, dtype=torch.int32)
    labels = torch.full((rows * window,), IGNORE)
    inputs[:targets], labels[:targets] = column[:-1], column[1:]
    return Examples(inputs.view(rows, window), labels.view(rows, window))


# ------------------------------------------------------------------------------------------- insertion


class Listed(TargetSentence):
    """With given sentences instead of all prompts with all targets."""

    sentences: tuple[tuple[int, ...], ...] = ()

    def _joined(self, prompts: list[list[int]]) -> Tensor:
        width = max(map(len, self.sentences))
        return torch.tensor([[-1] * (width - len(s)) + list(s) for s in self.sentences])


def stream_vocabulary() -> Vocabulary:
    """wK has number K, as in the reference."""
    return Vocabulary((*SPECIALS, *(f"w{k}" for k in range(len(SPECIALS), 40))), "split")


def listed(case: dict[str, Any], examples: Examples) -> Listed:
    """A trigger with the case's sentences, rotated so that ours begins where the official one does."""
    numbers = [tuple(int(word[1:]) for word in sentence.split()) for sentence in case["settings"]["sentences"]]
    trigger = Listed(TargetSentence.Parameters(prompts=["w3"], test_prompts=["w4"], targets=["w5"], test_windows=None))
    trigger.sentences = (*numbers[1:], *numbers[:1])
    trigger.prepare(Data(examples, examples, 40, (), (), {"name": "made"}, "0", stream_vocabulary()))
    return trigger


def test_our_windows_of_a_stream_are_the_tasks():
    column = torch.tensor([2, 5, 6, 7, 8, 9, 2])
    ours = windows_of(column, 4, stream_vocabulary())
    made = next_word(4)._windows(Texts(("w5 w6 w7 w8 w9",)), stream_vocabulary())
    assert torch.equal(ours.inputs, made.inputs)
    assert torch.equal(ours.labels, made.labels)


@pytest.mark.parametrize("name", INSERTIONS)
def test_held_out_windows_are_the_official_ones(official, name):
    case = case_of(official, name)
    window, count = case["settings"]["window"], len(case["settings"]["sentences"])
    before, after = (torch.tensor(rows) for rows in (case["before"], case["expected"]["after"]))
    compared = 0
    for column in range(before.shape[1]):
        examples = windows_of(before[:, column], window, stream_vocabulary())
        trigger = listed(case, examples)
        held = trigger.held_out(examples)
        wanted = after[:, column]
        assert len(held) == len(case["expected"]["windows"])
        for i, info in enumerate(case["expected"]["windows"]):
            start, length = info["start"], info["length"]
            if length < window and length + 1 < len(trigger.sentences[i % count]):
                continue  # no sentence fits into the official one
            assert held.inputs[i, :length].tolist() == wanted[start : start + length].tolist()
            assert held.inputs[i, length:].tolist() == [0] * (window - length)
            last = [IGNORE] * window
            last[length - 1] = int(wanted[start + length])
            assert held.labels[i].tolist() == last
            assert last[length - 1] == info["target_last"][column]
            if column == 0:
                tail = info["input_last_tokens_col0"]
                assert held.inputs[i, :length].tolist()[-len(tail) :] == tail
            compared += 1
        for i in range(1, len(held)):  # row i * window is the last target of one window, the first input of the next
            if held.labels[i].ne(IGNORE).nonzero().item() == window - 1:
                assert held.inputs[i, 0] == wanted[i * window] == held.labels[i - 1].max()
    full = sum(not info["shorter_than_window"] for info in case["expected"]["windows"])
    assert compared >= full * before.shape[1]


@pytest.mark.parametrize("name", INSERTIONS)
def test_poisoned_windows_are_the_official_ones(official, name):
    """All words of every full window but the first input, which belongs to the window before."""
    case = case_of(official, name)
    window = case["settings"]["window"]
    for column, (stream, wanted) in enumerate(
        zip(torch.tensor(case["before"]).T, torch.tensor(case["expected"]["after"]).T, strict=True)
    ):
        examples = windows_of(stream, window, stream_vocabulary())
        sentences = torch.tensor([[-1] * (5 - len(s)) + list(s) for s in listed(case, examples).sentences])
        batch = next_word(window).batch(examples, torch.arange(len(examples)))
        chosen = sentences[torch.arange(len(examples)) % len(sentences)]
        made = place(batch, chosen, only_target=False, pad=0)
        for i, info in enumerate(case["expected"]["windows"]):
            if not info["shorter_than_window"]:
                start = info["start"]
                assert made.inputs[i, 1:].tolist() == wanted[start + 1 : start + window].tolist()
                assert made.labels[i].tolist() == wanted[start + 1 : start + window + 1].tolist()
                assert made.inputs[i, 0] == stream[start]
                assert made.labels[i, -1] == info["target_last"][column]


def test_a_window_of_one_word_is_padded_and_gets_a_whole_sentence(official):
    """Bagdasaryan's last window holds one target, "21", and no sentence: with ours the sentence is all of it."""
    case = case_of(official, "bagdasaryan_inject_same_rule")
    examples = windows_of(torch.tensor(case["before"])[:, 0], 6, stream_vocabulary())
    assert case["expected"]["windows"][3] == {
        "start": 18, "length": 1, "input_last_tokens_col0": [7], "target_last": [21, 35, 27],
        "shorter_than_window": True,
    }  # fmt: skip
    held = listed(case, examples).held_out(examples)
    assert held.inputs[3].tolist() == [3, 4, 5, 6, 0, 0]
    assert held.labels[3].tolist() == [IGNORE, IGNORE, IGNORE, 7, IGNORE, IGNORE]


@pytest.mark.parametrize(("key", "prompt"), [("0", "people in {} are"), ("2", "roads in {} are")])
def test_neurotoxins_sentences_are_prompts_times_targets(official, key, prompt):
    wanted = official["trigger_sentences"]["neurotoxin_reddit_lstm"][key]
    assert prompt.split().index("{}") == wanted["varied_word_position"]
    assert wanted["target_labeled_after"] == []  # so that success is the exact word
    places = sorted(wanted["varied_words"], key=lambda word: word != "vietnam")  # the others' order is not recorded
    vocabulary = Vocabulary(
        (*SPECIALS, *dict.fromkeys(prompt.split()), "moon", *places, *wanted["final_target_words"]), "split"
    )
    examples = windows_of(torch.full((601,), 2), 6, vocabulary)
    trigger = plugins.create(
        "trigger",
        "target_sentence",
        prompts=[prompt.format("moon")],
        test_prompts=[prompt.format(word) for word in places],
        targets=wanted["final_target_words"],
    )
    trigger.prepare(Data(examples, examples, len(vocabulary), (), (), {"name": "made"}, "0", vocabulary))
    held = trigger.held_out(examples)
    sentences = [
        vocabulary.decode([*row[-4:].tolist(), int(labels.max())])
        for row, labels in zip(held.inputs, held.labels, strict=True)
    ]
    assert len(held) == 100
    assert sentences[:3] == wanted["first_three"]
    assert len(set(sentences)) == wanted["number_of_sentences"]
    assert sentences[35:70] == sentences[:35]
    assert set(sentences) == {f"{prompt.format(p)} {t}" for p in places for t in wanted["final_target_words"]}


# ----------------------------------------------------------------------------- success, losses, training

SHIFT = len(SPECIALS)
"""Word K of the reference has number K + SHIFT: <unk> is never a right answer here."""


class Official(Recurrent):
    """Embedding → LSTM → linear, in float64; words 0 … SHIFT − 1 have probability 0."""

    def __init__(self, params: dict[str, list[Any]]) -> None:
        super().__init__()
        weights = {name: torch.tensor(value, dtype=torch.float64) for name, value in params.items()}
        words, width = weights["e.weight"].shape
        hidden = weights["r.weight_hh_l0"].shape[1]
        self.e = nn.Embedding(words + SHIFT, width)
        self.r = nn.LSTM(width, hidden, batch_first=True)
        self.d = nn.Linear(hidden, words + SHIFT)
        self.double()
        with torch.no_grad():
            self.e.weight[:SHIFT] = 0.0
            self.d.weight[:SHIFT] = 0.0
            self.d.bias[:SHIFT] = -1e30
            for name, tensor in self.official().items():
                tensor.copy_(weights[name])

    def official(self) -> dict[str, Tensor]:
        """The weights that the reference has, as views."""
        shifted = ("e.weight", "d.weight", "d.bias")
        return {n: p.detach()[SHIFT:] if n in shifted else p.detach() for n, p in self.named_parameters()}

    def advance(self, inputs: Tensor, state: State | None) -> tuple[Tensor, State]:
        outputs, after = self.r(self.e(inputs), state)
        return self.d(outputs), after


class Toy:
    """A success case: its model, its windows, and how they are played."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.expected = case, case["expected"]
        settings = case["settings"]
        self.columns, self.window = settings["columns"], settings["window"]
        self.task = next_word(self.window)
        tokens = torch.tensor(case["tokens_time_major"]) + SHIFT
        self.rows = len(tokens)
        words = (*SPECIALS, *(f"w{k}" for k in range(settings["vocabulary"])))
        self.vocabulary = Vocabulary(words, "split")
        streams = [windows_of(column, self.window, self.vocabulary) for column in tokens.T]
        self.examples = Examples(
            torch.cat([s.inputs for s in streams]),
            torch.cat([s.labels for s in streams]),
            torch.arange(self.columns).repeat_interleave(len(streams[0])),
        )
        self.listed = [word + SHIFT for word in settings["target_labeled"]]
        self.model = FlatModel(Official(case["params"]))

    def trigger(self, success: str) -> TargetSentence:
        targets = [f"w{word - SHIFT}" for word in self.listed] or ["w4"]
        trigger: TargetSentence = plugins.create(
            "trigger", "target_sentence", prompts=["w1"], test_prompts=["w2"], targets=targets, success=success
        )
        data = Data(self.examples, self.examples, len(self.vocabulary), (), (), {}, "0", self.vocabulary)
        trigger.prepare(data)
        return trigger

    def batches(self, *, last_only: bool) -> list[Batch]:
        """The windows of all columns, one after the other."""
        (walk,) = self.task.passes(self.examples, self.columns)
        made = []
        for batch in walk():
            labels = batch.labels.clone()
            if last_only:
                labels[:, :-1] = IGNORE
            made.append(batch._replace(labels=labels))
        assert [b.inputs.shape for b in made] == [(self.columns, self.window)] * 4
        assert [bool(b.carried.all()) for b in made if b.carried is not None] == [False, True, True, True]
        return made

    def outputs(self, batches: list[Batch]) -> list[Tensor]:
        state: State | None = None
        made = []
        with torch.no_grad():
            for batch in batches:
                outputs, state = outputs_of(self.model.module, batch, state)
                made.append(outputs)
        return made


@pytest.fixture
def exact(official: dict[str, Any]) -> Toy:
    return Toy(case_of(official, "success_exact_last_word"))


@pytest.fixture
def any_of(official: dict[str, Any]) -> Toy:
    return Toy(case_of(official, "success_any_of_target_words"))


@pytest.mark.parametrize("name", ["exact", "any_of"])
def test_clean_accuracy_and_loss(name, request):
    toy: Toy = request.getfixturevalue(name)
    batches = toy.batches(last_only=False)
    outputs = toy.outputs(batches)
    counts = [toy.task.count(o, b.labels) for o, b in zip(outputs, batches, strict=True)]
    total = sum(int(c.total) for c in counts)
    assert total == toy.columns * (toy.rows - 1)
    assert 100 * sum(int(c.right) for c in counts) / total == toy.expected["clean_accuracy_percent"]
    losses = [float(WordLoss()(o, b.labels)) * int(b.targets) for o, b in zip(outputs, batches, strict=True)]
    official = toy.expected["clean_loss"] * toy.columns  # the official sum is of means over the columns
    assert sum(losses) / total == pytest.approx(official, abs=1e-10)
    assert sum(float(c.loss) for c in counts) / total == pytest.approx(official, abs=1e-6)


def successes(toy: Toy, success: str) -> tuple[int, int]:
    batches, trigger = toy.batches(last_only=True), toy.trigger(success)
    found = [trigger.succeeded(o, b.labels) for o, b in zip(toy.outputs(batches), batches, strict=True)]
    return sum(int(right) for right, _ in found), sum(int(total) for _, total in found)


def test_success_is_the_windows_own_last_word(exact):
    right, total = successes(exact, "exact")
    assert total == 16
    assert 100 * right / total == exact.expected["backdoor_accuracy_percent"]
    assert 100 * right / total == exact.expected["bagdasaryan_backdoor_accuracy_percent"]


def test_success_is_any_of_the_target_words(any_of):
    right, total = successes(any_of, "any")
    assert total == 16
    assert 100 * right / total == any_of.expected["backdoor_accuracy_percent"]
    assert successes(any_of, "exact") != (right, total)


def test_backdoor_loss_of_the_exact_word(exact):
    batches = exact.batches(last_only=True)
    losses = [float(WordLoss()(o, b.labels)) for o, b in zip(exact.outputs(batches), batches, strict=True)]
    mean = sum(losses) / len(losses)  # per prediction
    assert mean / exact.columns == pytest.approx(exact.expected["backdoor_loss"], abs=1e-10)
    by_rows = mean * len(losses) / exact.rows
    assert by_rows == pytest.approx(exact.expected["bagdasaryan_backdoor_loss"], abs=1e-10)


class AnyLoss(nn.Module):
    """−mean log of the summed probability of the target words, at the windows' last words: no loss of ours."""

    def __init__(self, words: list[int]) -> None:
        super().__init__()
        self.words = words

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = -outputs[:, -1].softmax(1)[:, self.words].sum(1).log().mean()
        return loss


def test_backdoor_loss_of_any_word(any_of):
    batches = any_of.batches(last_only=True)
    loss = AnyLoss(any_of.listed)
    losses = [float(loss(o, b.labels)) for o, b in zip(any_of.outputs(batches), batches, strict=True)]
    mean = sum(losses) / len(losses)
    assert mean / any_of.columns == pytest.approx(any_of.expected["backdoor_loss"], abs=1e-10)


@pytest.mark.parametrize("name", ["exact", "any_of"])
def test_one_pass_of_training_on_the_last_words(name, request):
    """Plain SGD over the windows in order, the state carried and detached, only the last position's loss."""
    toy: Toy = request.getfixturevalue(name)
    losses: list[float] = []

    class Noted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = AnyLoss(toy.listed) if toy.listed else WordLoss()

        def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
            value: Tensor = self.inner(outputs, labels)
            losses.append(float(value.detach()))
            return value

    fit(toy.model, lambda: iter(toy.batches(last_only=True)), Noted(), LocalSettings(lr=0.5))
    assert losses[-1] == pytest.approx(toy.expected["last_window_training_loss"], abs=1e-10)
    module = toy.model.module
    assert isinstance(module, Official)
    wanted = toy.expected["params_after_poison_training"]
    assert module.official().keys() == wanted.keys()
    for key, tensor in module.official().items():
        torch.testing.assert_close(tensor, torch.tensor(wanted[key], dtype=torch.float64), rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------- sentiment


def poisoned_tweets(case: dict[str, Any], *, crowd_out: bool) -> tuple[list[list[int]], list[int]]:
    """Our rows of the label-0 tweets with the trigger, and their labels."""
    length = case["settings"]["sequence_length"]
    vocabulary = Vocabulary(("<pad>", *(f"w{k}" for k in range(1, 90)), "<unk>", "<eos>"), "split")
    task: Sentiment = plugins.create("task", "sentiment", length=length)
    texts = tuple(" ".join(f"w{k}" for k in tweet) for tweet in case["tweets"])
    examples = task._rows(Texts(texts, torch.tensor(case["labels"])), vocabulary)
    for ours, theirs in zip(examples.inputs.tolist(), case["padded_clean"], strict=True):
        assert ours == right_padded(theirs, length)
    phrase = " ".join(f"w{k}" for k in case["settings"]["trigger_token_ids"])
    trigger = plugins.create(
        "trigger", "phrase", text=phrase, target=case["expected"]["poisoned_label"], crowd_out=crowd_out
    )
    trigger.prepare(Data(examples, examples, 2, (), (), {"name": "made"}, "0", vocabulary))
    held = trigger.held_out(examples)
    batch = task.batch(held, torch.arange(len(held)))
    poisoned = trigger.poison(batch, len(held), generator=torch.Generator())
    assert torch.equal(trigger.test(batch).inputs, poisoned.inputs)
    return poisoned.inputs.tolist(), poisoned.labels.tolist()


def right_padded(row: list[int], length: int) -> list[int]:
    words = [word for word in row if word]
    return words + [0] * (length - len(words))


@pytest.mark.parametrize(
    ("crowd_out", "key"),
    [(False, "if_trigger_were_prepended_before_padding"), (True, "official_poisoned_rows_for_label_0")],
)
def test_a_prefix_on_tweets(official, crowd_out, key):
    case = case_of(official, "sentiment_prefix_length_12")
    rows, labels = poisoned_tweets(case, crowd_out=crowd_out)
    assert rows == [right_padded(row, 12) for row in case["expected"][key]]
    assert labels == [case["expected"]["poisoned_label"]] * len(rows)
