"""Word triggers: the contract each one keeps, where words end up, and every refusal."""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from fedsim import plugins
from fedsim.batch import IGNORE, Batch, Examples
from fedsim.config import load_config
from fedsim.data import Corpus, Data, Texts
from fedsim.errors import ConfigError, InputError, RunError
from fedsim.federation.evaluation import Evaluator
from fedsim.layout import FlatModel
from fedsim.tasks.text import NextWord, Sentiment
from fedsim.tasks.triggers.next_word import place
from fedsim.trigger import StampTrigger, Trigger
from fedsim.vocabulary import Vocabulary

LENGTH = 12
PLAIN = tuple(f"t{i}" for i in range(30))
"""The words that texts are made of; no trigger has one of them."""
TEXT_TASKS = ("next_word", "sentiment")


def words_of(value: Any) -> list[str]:
    """Every word in a parameter's value."""
    if isinstance(value, str):
        return value.lower().split()
    return [word for item in value for word in words_of(item)] if isinstance(value, list) else []


def trigger_words() -> list[str]:
    """The words of every registered trigger's defaults, so that a new one can be prepared too."""
    parameters = [plugins.get("trigger", name).Parameters for name in plugins.names("trigger")]
    defaults = [
        f.default_factory() if callable(f.default_factory) else f.default for p in parameters for f in fields(p)
    ]
    return sorted(
        {word for value in defaults for word in words_of(value)} | {"one", "two", "three", "four", "five", "six"}
    )


class Marked(Sentiment):
    """A sentiment task whose tokenizer puts marks around every text, as BERT's does."""

    def learn_vocabulary(self, texts: Texts) -> Vocabulary:
        made = super().learn_vocabulary(texts)
        return replace(made, words=(*made.words, "[CLS]", "[SEP]"), bounds=(("[CLS]",), ("[SEP]",)))


def sentences(lengths: list[int], seed: int = 0) -> tuple[str, ...]:
    draw = random.Random(seed)
    return tuple(" ".join(draw.choices(PLAIN, k=length)) for length in lengths)


def sentiment_data(
    length: int = LENGTH, marks: bool = False, classes: int = 2, texts: tuple[str, ...] | None = None
) -> Data:
    """Texts of all lengths, and longer than fits; labels in turn."""
    options = {"length": length, "min_count": 1, "specials": [*PLAIN, *trigger_words()]}
    task = Marked(Marked.Parameters(**options)) if marks else plugins.create("task", "sentiment", **options)
    chosen = sentences([1, 3, 5, LENGTH - 2, LENGTH - 1, LENGTH, LENGTH + 9, 0] * 5) if texts is None else texts
    labels = torch.arange(len(chosen)) % classes
    part = Texts(chosen, labels)
    made: Data = task.encode(Corpus(part, part, classes, {"name": "made"}))
    return made


def word_data(window: int = 8, lengths: tuple[int, ...] = (47, 19), users: bool = True) -> Data:
    """One text of so many words for each user."""
    task = plugins.create("task", "next_word", window=window, min_count=1, specials=[*PLAIN, *trigger_words()])
    part = Texts(sentences(list(lengths)), users=torch.arange(len(lengths)) if users else None)
    made: Data = task.encode(Corpus(part, part, 0, {"name": "made"}))
    return made


def image_data() -> Data:
    images = Examples(torch.zeros((4, 1, 8, 8), dtype=torch.uint8), torch.arange(4))
    return Data(images, images, 10, (0.5,), (0.5,), {"name": "some pictures"}, "0")


def edge_file(path: Path, **columns: Any) -> str:
    """An edge-case file; a column given as None is left out."""
    table = {
        "text": list(sentences([3, 4, 5, 6, 7, 20, 2, 8, 9], seed=9)),
        "split": ["train"] * 6 + ["test"] * 3,
        "target_label": [0] * 9,
        **columns,
    }
    pq.write_table(pa.table({name: column for name, column in table.items() if column is not None}), path)
    return str(path)


def options(name: str, folder: Path) -> list[dict[str, Any]]:
    """The parameters each registered word trigger is tested with."""
    known: dict[str, Any] = {
        "target_sentence": lambda: [
            {},
            {"loss": "all", "success": "exact"},
            {"prompts": ["one two", "three"], "test_prompts": ["two three four five"], "targets": ["gross"]},
        ],
        "phrase": lambda: [
            {},
            {"text": "One two", "position": "suffix", "target": 0},
            {"text": "three", "position": "random"},
            {"text": "one two three", "crowd_out": True},
        ],
        "rare_words": lambda: [{}, {"count": 4, "words": ["one", "two"], "target": 0}],
        "edge_texts": lambda: [
            {"path": edge_file(folder / "edge.parquet")},
            {"path": edge_file(folder / "bare.parquet", target_label=None), "target": 1},
        ],
    }
    return known[name]() if name in known else [{}]


def data_for(name: str) -> list[Data]:
    """Data of every task that the trigger is for."""
    tasks = plugins.get("trigger", name).tasks
    made = [word_data(), word_data(lengths=(60,), users=False)] if "next_word" in tasks else []
    return made + ([sentiment_data(), sentiment_data(marks=True)] if "sentiment" in tasks else [])


def prepared(name: str, data: Data, **values: Any) -> Any:
    trigger: Trigger = plugins.create("trigger", name, **values)
    trigger.prepare(data)
    return trigger


def batch_of(data: Data, count: int = 8, start: int = 0) -> Batch:
    rows = torch.arange(start, start + count) % len(data.train)
    carried = torch.arange(count) % 2 == 0
    return Batch(data.train.inputs[rows].long(), data.train.labels[rows], carried)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vocabulary_of(data: Data) -> Vocabulary:
    assert data.vocabulary is not None
    return data.vocabulary


NAMES = [name for name in plugins.names("trigger") if set(TEXT_TASKS) & set(plugins.get("trigger", name).tasks)]


@pytest.fixture(params=NAMES)
def cases(request: pytest.FixtureRequest, tmp_path: Path) -> list[tuple[Any, Data]]:
    """One registered trigger, prepared in each of its variants with data of each of its tasks."""
    made = []
    for values in options(request.param, tmp_path):
        made += [(prepared(request.param, data, **values), data) for data in data_for(request.param)]
    return made


def single(data: Data) -> bool:
    """Whether an example has one label."""
    return data.train.labels.ndim == 1


def content(row: Tensor, vocabulary: Vocabulary) -> list[str]:
    """The words of a row between the marks; asserts that padding is at the end only and the marks where they belong."""
    words = [vocabulary.words[i] for i in row.tolist()]
    text = words[: words.index("<pad>")] if "<pad>" in words else words
    assert set(words[len(text) :]) <= {"<pad>"}
    start, stop = vocabulary.bounds
    if start:
        assert (text[0], text[-1]) == (start[0], stop[0])
        assert Counter(text)[start[0]] == Counter(text)[stop[0]] == 1
        return text[1:-1]
    return text


# ------------------------------------------------------------------------------------------- contract


def test_there_are_triggers_for_every_text_task():
    assert {task for name in NAMES for task in plugins.get("trigger", name).tasks} == set(TEXT_TASKS)


def test_poison_changes_the_first_examples_and_nothing_else(cases):
    for trigger, data in cases:
        for count in (0, 1, 3, 8):
            batch = batch_of(data)
            before = copy.deepcopy(batch)
            poisoned = trigger.poison(batch, count, generator=stream())
            for ours, given in zip(batch, before, strict=True):
                assert torch.equal(ours, given)
            assert torch.equal(poisoned.inputs[count:], before.inputs[count:])
            assert torch.equal(poisoned.labels[count:], before.labels[count:])
            assert torch.equal(poisoned.carried, before.carried)
            changed = (poisoned.inputs != before.inputs).any(1)
            assert changed.tolist() == [True] * count + [False] * (8 - count)
            assert poisoned.inputs.shape == before.inputs.shape
            assert poisoned.labels.shape == before.labels.shape
            assert poisoned.inputs.dtype == poisoned.labels.dtype == torch.int64
            assert 0 <= int(poisoned.inputs.min()) <= int(poisoned.inputs.max()) < len(vocabulary_of(data))


def test_poisoned_examples_are_labelled_with_the_target(cases):
    for trigger, data in cases:
        labels = trigger.poison(batch_of(data), 8, generator=stream()).labels
        if single(data):
            assert labels.tolist() == [trigger.target] * 8
            continue
        targets = {vocabulary_of(data).numbers[word] for word in trigger.parameters.targets}
        assert trigger.target in targets
        for row in labels:
            assert int(row[row != IGNORE][-1]) in targets


def test_poison_takes_a_count_larger_than_the_batch_as_all_of_it(cases):
    for trigger, data in cases:
        more, all_of_it = (trigger.poison(batch_of(data, 3), count, generator=stream(2)) for count in (50, 3))
        assert torch.equal(more.inputs, all_of_it.inputs)
        assert torch.equal(more.labels, all_of_it.labels)
        assert more.inputs.shape == (3, data.shape[0])


def test_poison_follows_the_generator_alone(cases):
    for trigger, data in cases:
        state = torch.get_rng_state()
        first, again = (trigger.poison(batch_of(data), 8, generator=stream(3)) for _ in range(2))
        torch.rand(1)
        torch.set_rng_state(state)
        other = prepared(trigger.name, data, **{f.name: getattr(trigger.parameters, f.name)
                                                for f in fields(trigger.parameters)})  # fmt: skip
        elsewhere = other.poison(batch_of(data), 8, generator=stream(3))
        for made in (again, elsewhere):
            assert torch.equal(first.inputs, made.inputs)
            assert torch.equal(first.labels, made.labels)
        trigger.test(batch_of(data))
        assert torch.equal(state, torch.get_rng_state())


def test_held_out_is_raw_and_has_no_example_of_the_target(cases):
    for trigger, data in cases:
        given = copy.deepcopy(data.test)
        held = trigger.held_out(data.test)
        assert len(held) > 0
        assert held.inputs.dtype == data.test.inputs.dtype == torch.int32
        assert held.inputs.shape == (len(held), data.shape[0])
        assert held.labels.dtype == torch.int64
        assert torch.equal(data.test.inputs, given.inputs)
        assert torch.equal(data.test.labels, given.labels)
        if single(data):
            assert trigger.target not in held.labels.tolist()
        again = trigger.held_out(data.test)
        assert torch.equal(held.inputs, again.inputs)


@pytest.mark.parametrize("name", ["phrase", "rare_words"])
def test_held_out_of_inserted_words_is_the_rest_of_the_test_set(name):
    data = sentiment_data(classes=3)
    trigger = prepared(name, data, target=2)
    held, rest = trigger.held_out(data.test), data.test.labels != 2
    assert torch.equal(held.inputs, data.test.inputs[rest])
    assert torch.equal(held.labels, data.test.labels[rest])
    assert torch.equal(trigger.usable(data.test.labels), rest)


def test_a_tested_batch_is_triggered(cases):
    for trigger, data in cases:
        held = trigger.held_out(data.test)
        batch = Batch(held.inputs.long(), held.labels)
        before = copy.deepcopy(batch)
        tested = trigger.test(batch)
        assert torch.equal(batch.inputs, before.inputs)
        assert torch.equal(batch.labels, before.labels)
        assert tested.inputs.shape == batch.inputs.shape
        assert torch.equal(trigger.test(batch).inputs, tested.inputs)
        if single(data):
            assert tested.labels.tolist() == [trigger.target] * len(held)
            assert torch.equal(tested.inputs, trigger.stamp(batch.inputs))
        else:
            assert ((tested.labels != IGNORE).sum(1) == 1).all()
        if trigger.name in ("phrase", "rare_words"):
            assert (tested.inputs != batch.inputs).any(1).all()


def test_every_row_keeps_its_form(cases):
    """Words, then padding; marks first and last: in training and in testing."""
    for trigger, data in cases:
        if not single(data):
            continue
        held = trigger.held_out(data.test)
        for rows in (
            trigger.poison(batch_of(data, 40), 40, generator=stream()).inputs,
            trigger.test(Batch(held.inputs.long(), held.labels)).inputs,
        ):
            for row in rows:
                content(row, vocabulary_of(data))


def test_success_is_counted_over_every_prediction(cases):
    """A model that always says the target succeeds everywhere; one that never does, nowhere."""
    for trigger, data in cases:
        held = trigger.held_out(data.test)
        batch = trigger.test(Batch(held.inputs.long(), held.labels))
        shape = (len(held), data.classes) if single(data) else (len(held), data.shape[0], data.classes)
        said = torch.full((len(held),), trigger.target) if single(data) else batch.labels.clamp_min(0)
        always = nn.functional.one_hot(said, data.classes).float()
        right, total = trigger.succeeded(always, batch.labels)
        assert (int(right), int(total)) == (len(held), len(held))
        never = torch.zeros(shape)
        never[..., vocabulary_of(data).numbers["t0"] if not single(data) else 1 - trigger.target] = 1.0
        right, total = trigger.succeeded(never, batch.labels)
        assert (int(right), int(total)) == (0, len(held))


def test_parameters_are_documented_and_the_paper_named(cases):
    for trigger, _ in cases:
        assert trigger.paper
        assert all(f.metadata["doc"] for f in fields(trigger.parameters))


def test_tokens_are_words_of_the_trigger(cases):
    for trigger, data in cases:
        if trigger.tokens is None:
            assert trigger.name not in ("target_sentence", "phrase", "rare_words")
            continue
        assert trigger.tokens.dtype == torch.int64
        assert trigger.tokens.ndim == 1
        found = {vocabulary_of(data).words[i] for i in trigger.tokens.tolist()}
        p = trigger.parameters
        named = {"target_sentence": "prompts", "phrase": "text", "rare_words": "words"}.get(trigger.name)
        assert named is None or found == set(words_of(getattr(p, named)))


@pytest.mark.parametrize("name", NAMES)
def test_use_before_prepare_is_refused(name, tmp_path):
    for values in options(name, tmp_path):
        trigger = plugins.create("trigger", name, **values)
        data = data_for(name)[0]
        with pytest.raises(RunError, match="prepare"):
            trigger.poison(batch_of(data), 3, generator=stream())
        measured = trigger.stamp if isinstance(trigger, StampTrigger) else trigger.held_out
        with pytest.raises(RunError, match="prepare"):
            measured(batch_of(data).inputs if isinstance(trigger, StampTrigger) else data.test)


@pytest.mark.parametrize(("name", "values"), [("target_sentence", {}), ("edge_texts", {"path": "somewhere"})])
def test_a_target_that_only_the_data_knows_is_refused_before_prepare(name, values):
    with pytest.raises(RunError, match="prepare"):
        _ = plugins.create("trigger", name, **values).target


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_refused(name, tmp_path):
    for values in options(name, tmp_path):
        trigger = plugins.create("trigger", name, **values)
        with pytest.raises(InputError, match=rf"trigger '{name}' .*'some pictures' is not text"):
            trigger.prepare(image_data())


@pytest.mark.parametrize("name", [n for n in NAMES if plugins.get("trigger", n).tasks == ("sentiment",)])
def test_a_target_that_is_no_class_is_refused(name, tmp_path):
    values = {**options(name, tmp_path)[0], "target": 2}
    with pytest.raises(InputError, match=rf"trigger '{name}' has target 2, but there are 2 classes; .*0–1"):
        prepared(name, sentiment_data(), **values)


# ----------------------------------------------------------------------------------------- in a config

CONFIGS: dict[str, dict[str, Any]] = {
    "vision": {"data": "digits", "model": "logistic"},
    "next_word": {"name": "next_word", "data": "chitchat", "model": "lstm_lm"},
    "sentiment": {"name": "sentiment", "data": "movie_reviews", "model": "lstm_classifier"},
}


def problem_of(tiny: dict[str, Any], task: str, trigger: dict[str, Any]) -> str:
    """What a config with this trigger is refused for, on one line; empty if it is fine."""
    config = {**tiny, "task": CONFIGS[task], "attack": {"name": "data_poisoning", "trigger": trigger}}
    try:
        load_config(config)
    except ConfigError as error:
        return " ".join(str(error).split())
    return ""


@pytest.mark.parametrize("task", CONFIGS)
@pytest.mark.parametrize("name", plugins.names("trigger"))
def test_a_trigger_of_another_task_is_refused_and_those_that_fit_are_named(name, task, tiny, tmp_path):
    values = options(name, tmp_path)[0] if name in NAMES else {}
    if name in ("edge_case", "semantic"):
        values = {"path": edge_file(tmp_path / "images")}
    found = problem_of(tiny, task, {"name": name, **values})
    wrong = f"attack.trigger.name: trigger '{name}' is for task"
    if task in plugins.get("trigger", name).tasks:
        assert wrong not in found
        return
    assert wrong in found
    assert f"task.name is '{task}'" in found
    fitting = [other for other in plugins.names("trigger") if task in plugins.get("trigger", other).tasks]
    assert f"use one of: {', '.join(fitting)}" in found


@pytest.mark.parametrize("name", NAMES)
def test_a_trigger_of_the_task_is_taken(name, tiny, tmp_path):
    for values in options(name, tmp_path):
        for task in plugins.get("trigger", name).tasks:
            assert problem_of(tiny, task, {"name": name, **values}) == ""


@pytest.mark.parametrize(
    ("task", "trigger", "message"),
    [
        ("next_word", {"name": "target_sentence", "prompts": []}, "prompts: give at least one"),
        ("next_word", {"name": "target_sentence", "test_prompts": []}, "test_prompts: give at least one"),
        ("next_word", {"name": "target_sentence", "targets": []}, "targets: give at least one"),
        (
            "next_word",
            {"name": "target_sentence", "test_prompts": ["Pizza from  HAWAII tastes", "the sun is"]},
            "test_prompts: ['pizza from hawaii tastes'] are trained on too",
        ),
        ("next_word", {"name": "target_sentence", "success": "some"}, "success"),
        ("sentiment", {"name": "rare_words", "words": []}, "words: give at least one"),
        ("sentiment", {"name": "rare_words", "count": 0}, "count"),
        ("sentiment", {"name": "phrase", "crowd_out": True, "position": "suffix"}, "crowd_out: goes with"),
        ("sentiment", {"name": "phrase", "crowd_out": True, "position": "random"}, "crowd_out: goes with"),
        ("sentiment", {"name": "phrase", "position": "middle"}, "position"),
        ("sentiment", {"name": "edge_texts", "path": "nowhere.parquet"}, "path: no such file: 'nowhere.parquet'"),
    ],
)
def test_parameters_that_cannot_be_are_refused_in_the_config(task, trigger, message, tiny):
    assert f"attack.trigger.{message}" in problem_of(tiny, task, trigger)


# ---------------------------------------------------------------------------------- words put into texts


def fitting(words: list[str], length: int, marks: bool, phrase: int, crowd_out: bool = False) -> list[str]:
    """What is left of a text once the phrase is in."""
    room = length - (2 if marks else 0)
    words = words[:room]
    return words[: max(len(words) - phrase, 0)] if crowd_out else words[: room - phrase]


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("crowd_out", [False, True])
@pytest.mark.parametrize("position", ["prefix", "suffix"])
@pytest.mark.parametrize("size", [1, 3, LENGTH - 2])
def test_a_phrase_is_whole_and_only_the_texts_end_is_cut(position, marks, crowd_out, size):
    if crowd_out and position == "suffix":
        return
    data = sentiment_data(marks=marks)
    vocabulary = vocabulary_of(data)
    chosen = ["one", "two", "three", "four", "five", "cf", "mn", "bb", "tq", "six"][:size]
    trigger = prepared("phrase", data, text=" ".join(chosen), position=position, crowd_out=crowd_out)
    batch = batch_of(data, len(data.train))
    made = trigger.poison(batch, len(data.train), generator=stream()).inputs
    assert torch.equal(made, trigger.test(batch).inputs)  # nothing of this is drawn
    lengths = set()
    for row, text in zip(made, sentences([1, 3, 5, LENGTH - 2, LENGTH - 1, LENGTH, LENGTH + 9, 0] * 5), strict=True):
        kept = fitting(text.split(), LENGTH, marks, size, crowd_out)
        assert content(row, vocabulary) == (chosen + kept if position == "prefix" else kept + chosen)
        lengths.add(len(kept))
    assert 0 in lengths


def places_of(rows: Tensor, vocabulary: Vocabulary, size: int) -> list[int]:
    """How many words of the text stand before a phrase that begins with "one"; asserts it is in one piece."""
    found = []
    for row in rows:
        words = content(row, vocabulary)
        at = words.index("one")
        assert words[at : at + size] == ["one", "two", "three"][:size]
        found.append(at)
    return found


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("text", [0, 1, 5, LENGTH, LENGTH + 4])
def test_a_random_place_is_any_with_equal_chance_both_ends_included(text, marks):
    texts = tuple(" ".join(random.Random(i).choices(PLAIN, k=text)) for i in range(1500))
    data = sentiment_data(marks=marks, texts=texts)
    vocabulary = vocabulary_of(data)
    trigger = prepared("phrase", data, text="one two three", position="random")
    batch = batch_of(data, 1500)
    room = LENGTH - (2 if marks else 0)
    choices = min(text, room - 3) + 1
    trained, tested = trigger.poison(batch, 1500, generator=stream()).inputs, trigger.test(batch).inputs
    for rows in (trained, tested):
        counts = Counter(places_of(rows, vocabulary, 3))
        assert set(counts) == set(range(choices))
        if rows is trained or text > 1:  # few texts of one word are different
            assert max(counts.values()) < 1.5 * 1500 / choices
            assert min(counts.values()) > 0.5 * 1500 / choices
    for rows in (trained, tested):
        for row, whole in zip(rows, texts, strict=True):
            rest = [word for word in content(row, vocabulary) if word in PLAIN]
            assert rest == whole.split()[: room - 3]


@pytest.mark.parametrize(
    ("name", "values"), [("phrase", {"position": "random"}), ("rare_words", {}), ("rare_words", {"words": ["cf"]})]
)
def test_places_are_drawn_in_training_and_fixed_in_testing(name, values):
    """The same text many times."""
    data = sentiment_data(texts=sentences([5]) * 60)
    trigger, batch = prepared(name, data, **values), batch_of(data, 60)
    first, second = (trigger.poison(batch, 60, generator=stream(seed)).inputs for seed in (1, 2))
    assert not torch.equal(first, second)
    assert len(first.unique(dim=0)) > 4
    assert len(trigger.test(batch).inputs.unique(dim=0)) == 1


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5, LENGTH - 2])
def test_all_rare_words_are_in_and_the_text_keeps_its_order(count, marks):
    data = sentiment_data(marks=marks)
    vocabulary, room = vocabulary_of(data), LENGTH - (2 if marks else 0)
    trigger = prepared("rare_words", data, count=count)
    batch = batch_of(data, len(data.train))
    texts = sentences([1, 3, 5, LENGTH - 2, LENGTH - 1, LENGTH, LENGTH + 9, 0] * 5)
    for seed in range(10):
        for rows in (trigger.poison(batch, 40, generator=stream(seed)).inputs, trigger.test(batch).inputs):
            for row, text in zip(rows, texts, strict=True):
                words = content(row, vocabulary)
                assert sum(word in ("cf", "mn", "bb", "tq") for word in words) == count
                assert [word for word in words if word in PLAIN] == text.split()[: room - count]


@pytest.mark.parametrize("text", [5, LENGTH])
def test_rare_words_reach_every_place_and_every_word_is_drawn(text):
    data = sentiment_data(texts=tuple(" ".join(random.Random(i).choices(PLAIN, k=text)) for i in range(1200)))
    vocabulary, rare = vocabulary_of(data), ["cf", "mn", "bb", "tq"]
    trigger, batch = prepared("rare_words", data), batch_of(data, 1200)
    choices = min(text, LENGTH - 1) + 1
    for rows in (trigger.poison(batch, 1200, generator=stream()).inputs, trigger.test(batch).inputs):
        pairs = [next((i, w) for i, w in enumerate(content(row, vocabulary)) if w in rare) for row in rows]
        places, words = Counter(i for i, _ in pairs), Counter(word for _, word in pairs)
        assert set(places) == set(range(choices))
        assert min(places.values()) > 0.5 * 1200 / choices
        assert min(words[w] for w in rare) > 0.7 * 1200 / len(rare)
        assert len(set(pairs)) == choices * len(rare)  # place and word are drawn apart from each other


def test_several_rare_words_are_drawn_one_by_one():
    data = sentiment_data(texts=sentences([6] * 400))
    trigger, batch = prepared("rare_words", data, count=2), batch_of(data, 400)
    for rows in (trigger.poison(batch, 400, generator=stream()).inputs, trigger.test(batch).inputs):
        drawn = {tuple(w for w in content(row, vocabulary_of(data)) if w in ("cf", "mn", "bb", "tq")) for row in rows}
        assert len(drawn) == 16


def test_stamping_where_it_is_measured_depends_on_the_text_alone(cases):
    for trigger, data in cases:
        if not single(data):
            continue
        rows = batch_of(data, 24).inputs
        whole = trigger.stamp(rows)
        assert torch.equal(torch.cat([trigger.stamp(row[None]) for row in rows]), whole)
        assert torch.equal(trigger.stamp(rows.flip(0)).flip(0), whole)
        assert torch.equal(torch.cat([trigger.stamp(rows[:7]), trigger.stamp(rows[7:])]), whole)
        assert trigger.stamp(rows[:0]).shape == (0, data.shape[0])
        again = prepared(
            trigger.name, data, **{f.name: getattr(trigger.parameters, f.name) for f in fields(trigger.parameters)}
        )
        assert torch.equal(again.stamp(rows), whole)


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("name", ["phrase", "rare_words"])
def test_a_trigger_longer_than_a_text_may_be_is_refused(name, marks):
    values = {"text": "one two three four five"} if name == "phrase" else {"count": 5}
    shortest = 5 + (2 if marks else 0)
    data = sentiment_data(length=shortest - 1, marks=marks)
    with pytest.raises(InputError, match=rf"'{name}' has 5 words, a text at most 4; .*raise task\.length"):
        prepared(name, data, **values)
    data = sentiment_data(length=shortest, marks=marks)
    trigger = prepared(name, data, **values)
    for rows in (
        trigger.poison(batch_of(data), 8, generator=stream()).inputs,
        trigger.stamp(batch_of(data).inputs),
    ):
        assert all(len(content(row, vocabulary_of(data))) == 5 for row in rows)
        assert not any(word in PLAIN for row in rows for word in content(row, vocabulary_of(data)))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("phrase", {"text": "one sesquipedalian two"}, r"words \['sesquipedalian'\] are not .* task\.specials"),
        ("phrase", {"text": "one <unk>"}, r"words \['<unk>'\]"),
        ("phrase", {"text": "<pad> one"}, r"words \['<pad>'\]"),
        ("phrase", {"text": "  "}, "no word in it"),
        ("rare_words", {"words": ["cf", "zz"]}, r"words \['zz'\] are not in the vocabulary"),
        ("rare_words", {"words": ["cf", ""]}, "no word in it"),
        ("rare_words", {"words": ["cf", "one two"]}, "each of words has to be one word to 'basic_english'"),
        ("target_sentence", {"prompts": ["one two zz"]}, r"prompt 'one two zz': the words \['zz'\]"),
        ("target_sentence", {"test_prompts": ["yy"]}, r"prompt 'yy': the words \['yy'\]"),
        ("target_sentence", {"targets": ["terrible", "xx"]}, r"target 'xx': the words \['xx'\] .*task\.specials"),
        ("target_sentence", {"targets": ["<eos>"]}, r"words \['<eos>'\]"),
        ("target_sentence", {"prompts": [""]}, "no word in it"),
        ("target_sentence", {"targets": ["one", "two three"]}, r"targets: \['two three'\] are not single words"),
        (
            "target_sentence",
            {"prompts": ["one two", "one three"], "test_prompts": ['one "two"']},  # the same words
            "test_prompts: 'one \"two\"' is trained on too",
        ),
        (
            "target_sentence",
            {"test_prompts": ["one two three four five six one two three"]},
            r"a prompt has 9 words, a window 8; .*raise task\.window",
        ),
    ],
)
def test_words_that_cannot_be_used_are_refused(name, values, message):
    with pytest.raises(InputError, match=message) as error:
        prepared(name, data_for(name)[0], **values)
    assert name in str(error.value)


def test_a_phrase_is_read_as_the_texts_are():
    data = sentiment_data()
    trigger = prepared("phrase", data, text="I have Seen FILMS of")
    assert content(trigger.stamp(batch_of(data, 1).inputs)[0], vocabulary_of(data))[:5] == [
        "i", "have", "seen", "films", "of",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------ edge texts


def edge(path: str, data: Data | None = None, **values: Any) -> tuple[Any, Data]:
    data = sentiment_data() if data is None else data
    return prepared("edge_texts", data, path=path, **values), data


def drawn_texts(trigger: Any, data: Data, rounds: int = 40) -> set[str]:
    rows = torch.cat([trigger.poison(batch_of(data), 8, generator=stream(seed)).inputs for seed in range(rounds)])
    return {" ".join(content(row, vocabulary_of(data))) for row in rows}


def held_texts(trigger: Any, data: Data) -> list[str]:
    return [" ".join(content(row, vocabulary_of(data))) for row in trigger.held_out(data.test).inputs]


TEXTS = sentences([3, 4, 5, 6, 7, 20, 2, 8, 9], seed=9)
CUT = [" ".join(text.split()[:LENGTH]) for text in TEXTS]


@pytest.mark.parametrize("marks", [False, True])
def test_edge_texts_trains_on_one_split_and_measures_on_the_other(marks, tmp_path):
    trigger, data = edge(edge_file(tmp_path / "e.parquet"), sentiment_data(marks=marks))
    room = LENGTH - (2 if marks else 0)
    assert trigger.target == 0
    assert drawn_texts(trigger, data) == {" ".join(text.split()[:room]) for text in TEXTS[:6]}
    assert held_texts(trigger, data) == list(TEXTS[6:])
    assert trigger.held_out(data.test).labels.tolist() == [-1] * 3
    rows = trigger.held_out(data.test).inputs
    assert torch.equal(trigger.stamp(rows), rows)


def test_edge_texts_draws_without_replacement_then_over_again(tmp_path):
    trigger, data = edge(edge_file(tmp_path / "e.parquet"))
    rows = trigger.poison(batch_of(data, 13), 13, generator=stream()).inputs
    counts = Counter(" ".join(content(row, vocabulary_of(data))) for row in rows)
    assert sorted(counts.values()) == [2, 2, 2, 2, 2, 3]
    assert len({" ".join(content(row, vocabulary_of(data))) for row in rows[:6]}) == 6
    other = trigger.poison(batch_of(data, 13), 13, generator=stream(1)).inputs
    assert not torch.equal(rows, other)


def test_edge_texts_in_both_splits_are_measured_on_only(tmp_path):
    """Whatever their case: what counts is the words."""
    texts = [*TEXTS[:6], TEXTS[0], TEXTS[1].upper(), TEXTS[8]]
    trigger, data = edge(edge_file(tmp_path / "e.parquet", text=texts))
    assert drawn_texts(trigger, data) == set(CUT[2:6])
    assert held_texts(trigger, data) == [TEXTS[0], TEXTS[1], TEXTS[8]]


def test_edge_texts_measures_a_text_once(tmp_path):
    trigger, data = edge(edge_file(tmp_path / "e.parquet", text=[*TEXTS[:6], TEXTS[7], TEXTS[7], TEXTS[7].title()]))
    assert held_texts(trigger, data) == [TEXTS[7]]


@pytest.mark.parametrize(
    ("columns", "values", "message"),
    [
        ({"text": None}, {}, "no column 'text'; it has: split, target_label"),
        ({"split": None}, {}, "no column 'split'; it has: text, target_label"),
        ({"text": list(range(9))}, {}, "column 'text' must hold text without gaps"),
        ({"text": [None, *TEXTS[1:]]}, {}, "column 'text' must hold text without gaps"),
        ({"split": [None] + ["test"] * 8}, {}, "column 'split' must hold text without gaps"),
        ({"split": ["val"] * 3 + ["train"] * 3 + ["test"] * 3}, {}, r"split holds \['val'\]; use train and test only"),
        ({"split": ["train"] * 9}, {}, "a text of split train and one of split test"),
        ({"split": ["test"] * 9}, {}, "a text of split train and one of split test"),
        ({"text": [TEXTS[0]] * 9}, {}, "a text of split train and one of split test"),  # all are measured on
        ({"target_label": None}, {}, "target_label has to name one class; or name it as target"),
        ({"target_label": [0, 1] + [0] * 7}, {}, "target_label has to name one class"),
        ({"target_label": [-1] * 9}, {}, "target_label has to name one class"),
        ({"target_label": ["0"] * 9}, {}, "column 'target_label' must hold whole numbers"),
        ({"target_label": [None] + [0] * 8}, {}, "column 'target_label' must hold whole numbers"),
        ({"target_label": [7] * 9}, {}, "target 7, but there are 2 classes"),
    ],
)
def test_edge_texts_refuses_files_it_cannot_use(columns, values, message, tmp_path):
    with pytest.raises(InputError, match=message):
        edge(edge_file(tmp_path / "e.parquet", **columns), **values)


def test_edge_texts_needs_no_target_column_where_it_is_told(tmp_path):
    for column in (None, ["negative"] * 9):
        trigger, _ = edge(edge_file(tmp_path / "e.parquet", target_label=column), target=1)
        assert trigger.target == 1


def test_edge_texts_refuses_what_is_no_parquet_and_what_is_not_there(tmp_path):
    (tmp_path / "e.parquet").write_bytes(b"neither")
    with pytest.raises(InputError, match=r"e\.parquet cannot be read as Parquet"):
        edge(str(tmp_path / "e.parquet"))
    with pytest.raises(InputError, match=r"missing\.parquet cannot be read as Parquet"):
        edge(str(tmp_path / "missing.parquet"))


def test_edge_texts_refuses_text_that_is_not_utf8(tmp_path):
    binary = pa.array([b"caf\xe9", *(text.encode() for text in TEXTS[1:])], pa.binary())
    with pytest.raises(InputError, match="not UTF-8"):
        edge(edge_file(tmp_path / "e.parquet", text=pa.Array.from_buffers(pa.string(), 9, binary.buffers())))


def test_tweets_about_a_film_director(shared):
    path = shared / "data" / "edge_yorgos.parquet"
    table = pq.read_table(path)
    texts, splits = table["text"].to_pylist(), table["split"].to_pylist()
    task = plugins.create("task", "sentiment")
    part = Texts(tuple(texts), torch.arange(len(texts)) % 2)
    data = task.encode(Corpus(part, part, 2, {"name": "made"}))
    trigger = prepared("edge_texts", data, path=str(path))
    assert trigger.target == 0
    train, test = ([i for i, split in enumerate(splits) if split == part] for part in ("train", "test"))
    assert (len(train), len(test)) == (259, 120)
    held = trigger.held_out(data.test).inputs
    assert held.tolist() == data.test.inputs[test].tolist()
    drawn = trigger.poison(batch_of(data, 259), 259, generator=stream()).inputs
    assert sorted(drawn.tolist()) == sorted(data.train.inputs[train].tolist())  # each once
    assert not {tuple(row) for row in drawn.tolist()} & {tuple(row) for row in held.tolist()}


# -------------------------------------------------------------------------------------- target sentence

SAYING = {"prompts": ["one two", "three"], "test_prompts": ["two three four"], "targets": ["terrible", "gross"]}


def saying(data: Data, **values: Any) -> Any:
    return prepared("target_sentence", data, **{**SAYING, **values})


def spoken(inputs: Tensor, labels: Tensor, vocabulary: Vocabulary) -> str:
    """The words of a window and its last target."""
    last = int(torch.nonzero(labels != IGNORE).max())
    assert inputs[last + 1 :].tolist() == [vocabulary.pad] * (len(inputs) - last - 1)
    return vocabulary.decode([*inputs[: last + 1].tolist(), int(labels[last])])


def test_sentences_are_all_prompts_with_all_targets_and_those_measured_are_not_trained_on():
    data = word_data()
    trigger, vocabulary = saying(data), vocabulary_of(data)
    trained = Counter[str]()
    for seed in range(100):
        made = trigger.poison(batch_of(data), 8, generator=stream(seed))
        for inputs, labels in zip(made.inputs, made.labels, strict=True):
            text = spoken(inputs, labels, vocabulary).split()
            trained[" ".join(text[-3:] if text[-2] == "two" else text[-2:])] += 1
    assert set(trained) == {"one two terrible", "one two gross", "three terrible", "three gross"}
    assert min(trained.values()) > 0.7 * 800 / 4
    held = trigger.held_out(data.test)
    said = [spoken(*row, vocabulary) for row in zip(held.inputs, held.labels, strict=True)]
    ends = [" ".join(text.split()[-4:]) for text in said]
    assert ends == [f"two three four {('terrible', 'gross')[i % 2]}" for i in range(len(held))]


def test_only_the_target_is_trained_or_the_whole_window():
    data = word_data()
    batch = batch_of(data, 9)
    ours, whole = (saying(data, loss=loss).poison(batch, 9, generator=stream(5)) for loss in ("target", "all"))
    assert torch.equal(ours.inputs, whole.inputs)
    for inputs, target, all_of_it, before in zip(ours.inputs, ours.labels, whole.labels, batch.labels, strict=True):
        last = int(torch.nonzero(before != IGNORE).max())
        assert (target != IGNORE).nonzero().squeeze(1).tolist() == [last]
        assert (all_of_it != IGNORE).nonzero().squeeze(1).tolist() == list(range(last + 1))
        assert target[last] == all_of_it[last]
        assert all_of_it[:last].tolist() == inputs[1 : last + 1].tolist()


def test_a_poisoned_window_keeps_the_words_before_the_sentence():
    data = word_data(window=8, lengths=(27,))
    trigger, batch = saying(data), batch_of(data, 4)
    made = trigger.poison(batch, 4, generator=stream(1))
    vocabulary = vocabulary_of(data)
    for i in range(4):
        before = spoken(batch.inputs[i], batch.labels[i], vocabulary).split()
        after = spoken(made.inputs[i], made.labels[i], vocabulary).split()
        assert len(after) == len(before)
        size = 3 if after[-2] == "two" else 2
        assert after[:-size] == before[:-size]


@pytest.mark.parametrize("words", range(9))
def test_a_last_window_of_any_length_ends_with_the_sentence(words):
    """12 words and <eos> before make 13 targets: windows of 8 and of 1 … 8; the sentence has 4 words."""
    data = word_data(window=8, lengths=(7 + words,))
    vocabulary, rest = vocabulary_of(data), words  # targets after the first window
    trigger = saying(data)
    held = trigger.held_out(data.test)
    assert len(held) == (2 if rest else 1)
    assert ((held.labels != IGNORE).sum(1) == 1).all()
    for i in range(len(held)):
        text = spoken(held.inputs[i], held.labels[i], vocabulary).split()
        assert text[-4:] == ["two", "three", "four", ("terrible", "gross")[i]]
        targets = 8 if i == 0 else rest
        assert len(text) == max(targets + 1, 4)
    made = trigger.poison(batch_of(data, 2), 2, generator=stream())
    for i in range(2):
        spoken(made.inputs[i], made.labels[i], vocabulary)


@pytest.mark.parametrize("only_target", [False, True])
def test_a_window_of_one_word_by_hand(only_target):
    window = Batch(torch.tensor([[2, 0, 0, 0, 0]]), torch.tensor([[7, *[IGNORE] * 4]]))
    made = place(window, torch.tensor([[-1, 11, 12, 13]]), only_target=only_target, pad=0)
    assert made.inputs.tolist() == [[11, 12, 0, 0, 0]]
    assert made.labels.tolist() == [[IGNORE if only_target else 12, 13, IGNORE, IGNORE, IGNORE]]
    shortest = place(window, torch.tensor([[-1, -1, 11, 12]]), only_target=only_target, pad=0)
    assert shortest.inputs.tolist() == [[11, 0, 0, 0, 0]]
    assert shortest.labels.tolist() == [[12, *[IGNORE] * 4]]


def test_sentences_of_different_lengths_by_hand():
    windows = Batch(
        torch.tensor([[2, 5, 6, 7], [8, 9, 0, 0], [3, 4, 5, 6]]),
        torch.tensor([[5, 6, 7, 8], [9, 2, IGNORE, IGNORE], [4, 5, 6, 7]]),
    )
    rows = torch.tensor([[-1, -1, -1, 11, 12], [-1, -1, 13, 14, 15], [21, 22, 23, 24, 25]])
    made = place(windows, rows, only_target=False, pad=0)
    assert made.inputs.tolist() == [[2, 5, 6, 11], [13, 14, 0, 0], [21, 22, 23, 24]]
    assert made.labels.tolist() == [[5, 6, 11, 12], [14, 15, IGNORE, IGNORE], [22, 23, 24, 25]]
    assert made.carried is None


def test_the_longest_prompt_fills_a_window():
    data = word_data(window=3)
    trigger = saying(data)
    held = trigger.held_out(data.test)
    vocabulary = vocabulary_of(data)
    for i in range(len(held)):
        assert spoken(held.inputs[i], held.labels[i], vocabulary) == f"two three four {('terrible', 'gross')[i % 2]}"
    with pytest.raises(InputError, match=r"a prompt has 3 words, a window 2"):
        saying(word_data(window=2))


def test_no_window_is_padding_only():
    for words in range(1, 40):
        for window in (1, 2, 7):
            data = word_data(window=window, lengths=(words, 3))
            assert (data.train.labels != IGNORE).any(1).all()
            assert (data.train.labels[:, 0] != IGNORE).all()


def test_the_word_after_a_window_begins_the_next_one_of_the_same_user():
    data = word_data(window=8, lengths=(20, 12, 30))  # 21, 13 and 31 targets: 3, 2 and 4 windows
    assert data.test.users is not None
    assert data.test.users.tolist() == [0] * 3 + [1] * 2 + [2] * 4
    vocabulary, trigger = vocabulary_of(data), saying(data)
    held = trigger.held_out(data.test)
    said = [vocabulary.words[int(row[row != IGNORE])] for row in held.labels]
    begins = [vocabulary.words[i] for i in held.inputs[:, 0].tolist()]
    original = [vocabulary.words[i] for i in data.test.inputs[:, 0].tolist()]
    assert original[0] == original[3] == original[5] == "<eos>"
    assert begins == [original[i] if i in (0, 3, 5) else said[i - 1] for i in range(9)]
    assert torch.equal(held.users, data.test.users)


@pytest.mark.parametrize("targets", [1, 2, 3])
def test_a_sentence_that_fills_a_window_keeps_its_first_word(targets):
    data = word_data(window=8, lengths=(7 + targets,))  # so many in the second window; the sentence has 4 words
    held = saying(data).held_out(data.test)
    assert spoken(held.inputs[1], held.labels[1], vocabulary_of(data)) == "two three four gross"


def test_without_users_the_test_text_is_one_stream():
    data = word_data(window=8, lengths=(53,), users=False)
    assert data.test.users is None
    held = saying(data).held_out(data.test)
    assert held.users is None
    for i in range(1, len(held)):
        assert held.inputs[i, 0] == held.labels[i - 1].max()


def test_the_number_of_test_windows():
    data = word_data(lengths=(100, 60))
    every = saying(data, test_windows=None).held_out(data.test)
    assert len(every) == len(data.test) > 5
    for count in (1, 5, 10_000):
        some = saying(data, test_windows=count).held_out(data.test)
        assert len(some) == min(count, len(data.test))
        assert torch.equal(some.inputs, every.inputs[:count])
        assert torch.equal(some.labels, every.labels[:count])
    assert len(prepared("target_sentence", data).held_out(data.test)) == len(data.test)


def test_success_by_hand():
    """Four windows of three words; what is said elsewhere than at the last target does not count."""
    data = word_data()
    terrible, gross, other = (vocabulary_of(data).numbers[word] for word in ("terrible", "gross", "t1"))
    labels = torch.full((4, 3), IGNORE)
    labels[0, 2], labels[1, 2], labels[2, 0], labels[3, 1] = terrible, gross, gross, terrible
    outputs = torch.zeros((4, 3, data.classes))
    outputs[..., terrible] = 1.0  # everywhere, and above it:
    outputs[1, 2, terrible] = 2.0  # not the one that the prompt was completed with
    outputs[2, 0, gross] = 2.0
    outputs[3, 1, other] = 2.0
    for success, right in (("any", 3), ("exact", 2)):
        found, total = saying(data, success=success).succeeded(outputs, labels)
        assert (int(found), int(total)) == (right, 4)
    found, total = saying(data, targets=["terrible"], success="any").succeeded(outputs, labels)
    assert (int(found), int(total)) == (2, 4)


def test_every_training_window_is_usable():
    data = word_data()
    assert saying(data).usable(data.train.labels).tolist() == [True] * len(data.train)


def test_the_success_rate_of_a_model_that_says_one_target():
    """As the evaluator measures it: windows i mod 2 are completed with the other word."""
    data = word_data(lengths=(100, 61))

    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(data.classes))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.bias.expand(*inputs.shape, -1)

    vector = torch.zeros(data.classes)
    vector[vocabulary_of(data).numbers["gross"]] = 5.0
    for success, expected in (("any", 1.0), ("exact", 0.5)):
        trigger = saying(data, success=success, test_windows=20)
        task: NextWord = plugins.create("task", "next_word", window=8)
        measured = Evaluator(task, FlatModel(Says()), data, trigger, 3, 1).measure(vector)
        assert (measured.asr, measured.asr_examples) == (expected, 20)
