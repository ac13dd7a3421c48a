"""The verdict, the wording of numbers, and the table for the terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsim.report import words
from fedsim.report.table import persistence_table


def life(rounds: int, censored: bool = False, first: int | None = None) -> dict[str, Any]:
    fall = rounds + 1 if first is None else first
    return {
        "rounds": rounds,
        "censored": censored,
        "first_crossing": {"rounds": rounds if censored else fall, "censored": censored and first is None},
    }


def summary_with(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "t0": 40,
        "lifespan": {"0.25": life(30), "0.5": life(20), "0.75": life(5)},
        "half_life": {"rounds": 18, "censored": False},
        "area": {"10": 0.8, "50": None},
        "asr_at": {"10": 0.7, "50": None},
        "time_to_inject": {"0.25": 1, "0.5": 2, "0.75": 4},
        "final": {"round": 90, "main_accuracy": 0.9, "main_loss": 0.3, "asr": 0.05},
        "stealth": None,
        "detection": {
            "auroc": {"krum.distance": 0.91},
            "tpr": 0.5,
            "fpr": 0.02,
            "fpr_attack_rounds": 0.04,
            "malicious_weight": 0.1,
        },
        "floor": "assumed 0",
    }
    return base | changes


def at_half(value: dict[str, Any] | None) -> dict[str, Any]:
    return {"0.25": value, "0.5": value, "0.75": value}


@pytest.mark.parametrize(
    ("changes", "headline", "detail"),
    [
        ({}, "The backdoor lived 20 rounds", "last malicious update (round 40)"),
        ({"lifespan": at_half(life(1))}, "The backdoor lived 1 round", "last above"),
        ({"lifespan": at_half(life(20, first=4))}, "The backdoor lived 20 rounds", "at age 4 and came back"),
        ({"lifespan": at_half(life(50, True))}, "The backdoor lived more than 50 rounds", "a lower bound"),
        ({"lifespan": at_half(life(0))}, "The backdoor did not outlive the attack", "never above"),
        (
            {"lifespan": at_half(life(0)), "time_to_inject": {"0.25": 1, "0.5": None, "0.75": None}},
            "The backdoor never took hold",
            "never above",
        ),
        ({"t0": 90, "lifespan": at_half(life(0, True))}, "The attack lasted until the run ended", "then alive"),
        ({"t0": 90, "lifespan": at_half(life(0))}, "The attack lasted until the run ended", "then dead"),
        ({"lifespan": at_half(None)}, "Persistence was not measured", "No round was evaluated"),
        ({"t0": None, "lifespan": at_half(None)}, "Nobody attacked", "No malicious client"),
    ],
)
def test_verdict(changes: dict[str, Any], headline: str, detail: str) -> None:
    answer = words.verdict(summary_with(**changes))
    assert answer.headline == headline
    assert detail in answer.detail


def test_verdict_only_says_came_back_where_it_did() -> None:
    assert "came back" not in words.verdict(summary_with()).detail


def test_headline_threshold() -> None:
    assert words.threshold(summary_with()) == "0.5"
    assert words.threshold(summary_with(lifespan={"0.1": None, "0.3": None, "0.9": None})) == "0.3"


def test_wording_of_numbers() -> None:
    assert words.percent(0.1234) == "12.3\u202f%"
    assert words.percent(0.25, 0) == "25\u202f%"
    assert words.percent(None) == "—"
    assert words.points(-0.0124) == "−1.2\u202fpp"
    assert words.points(0.02) == "+2.0\u202fpp"
    assert words.points(-0.0001) == "0.0\u202fpp"
    assert words.span({"rounds": 7, "censored": True}) == ">\u202f7"
    assert words.span({"rounds": 7, "censored": False}) == "7"
    assert words.number(0.94871) == "0.949"
    assert words.seconds(0.0099) == "9.9\u202fms"
    assert words.seconds(0.31) == "0.31\u202fs"
    assert words.seconds(12.4) == "12\u202fs"
    assert words.seconds(185) == "3\u202fmin 05\u202fs"
    assert words.seconds(7800) == "2\u202fh 10\u202fmin"
    assert words.seconds(59.7) == "1\u202fmin 00\u202fs"


def test_perplexity_in_digits_that_say_something() -> None:
    assert words.perplexity(None) == "—"
    assert words.perplexity(88.14) == "88.1"
    assert words.perplexity(3003.0) == "3003.0"
    assert words.perplexity(99_999.0) == "99999.0"
    assert words.perplexity(2.04e6) == "2.0e+06"
    assert words.perplexity(1e304) == "1.0e+304"


def config_of(task: str, **trigger: Any) -> dict[str, Any]:
    return {"task": {"name": task}, "attack": {"name": "pgd", "trigger": {"name": "some", **trigger}}}


def test_what_is_counted_is_said_for_text() -> None:
    for success, said in (
        ({}, "completes with a target word"),
        ({"success": "any"}, "completes with a target word"),
        ({"success": "exact"}, "completes with the very target word meant for them"),
    ):
        counted = words.counted(config_of("next_word", **success))
        assert counted.asr == f"share of held-out prompts that the model {said}"
        assert "first guess (top-1)" in counted.accuracy
        assert counted.of == "test prompts and words"
    assert words.counted({"task": {"name": "next_word"}, "attack": None}).asr.endswith("a target word")
    assert "none of them of the target class" in words.counted(config_of("sentiment")).asr
    for config in (config_of("vision"), {}, {"task": "vision"}):
        assert words.counted(config) == words.Counted("", "", "test examples")


def test_definitions_come_with_the_numbers() -> None:
    final = summary_with()["final"] | {"perplexity": 88.14, "class_accuracy": None}
    counted = words.counted(config_of("next_word"))
    rows = {row.name: row for row in words.persistence_sections(summary_with(final=final), counted)[2].rows}
    assert rows["final ASR"].definition == f"{counted.asr}; at the last evaluated round"
    assert rows["final main accuracy"].definition == f"{counted.accuracy}; at the last evaluated round"
    assert rows["final perplexity"].values == ("88.1",)
    assert "mean loss per held-out word" in rows["final perplexity"].definition
    plain = {row.name: row for row in words.persistence_sections(summary_with())[2].rows}
    assert set(plain) == {"half-life", "final ASR", "final main accuracy"}
    assert plain["final ASR"].definition == plain["final main accuracy"].definition == "at the last evaluated round"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"commonest_word": "<eos>", "commonest_word_accuracy": 0.0803},
            "For comparison: always saying “<eos>” would get a main accuracy of 8.0\u202f%.",
        ),
        (
            {"commonest_class": "negative", "commonest_class_accuracy": 0.5},
            "For comparison: always saying “negative” would get a main accuracy of 50.0\u202f%.",
        ),
        (
            {"commonest_class": 0, "commonest_class_accuracy": 1},
            "For comparison: always saying “class 0” would get a main accuracy of 100.0\u202f%.",
        ),
        ({"commonest_word": "the"}, ""),
        ({"commonest_word": "the", "commonest_word_accuracy": "much"}, ""),
        ({"commonest_class_accuracy": 0.5}, ""),
        ({}, ""),
    ],
)
def test_what_guessing_would_get(data: dict[str, Any], said: str) -> None:
    assert words.baseline(data) == said


def test_accuracy_per_class_in_words() -> None:
    section = words.class_section([0.5, None, 0.25], ["cat", "dog", "<eos>"], 2)
    assert section is not None
    assert [(row.name, row.values, row.definition) for row in section.rows] == [
        ("cat", ("50.0\u202f%",), ""),
        ("dog", ("—",), ""),
        ("<eos>", ("25.0\u202f%",), "target of the backdoor"),
    ]
    for names in ((), ["cat", "dog"]):  # none, or of something else
        numbers = words.class_section([0.5, None, 0.25], names)
        assert numbers is not None
        assert [row.name for row in numbers.rows] == ["0", "1", "2"]
        assert not any(row.definition for row in numbers.rows)
    assert words.class_section([0.5] * 20) is not None
    for nothing in (None, [], [0.5] * 21):
        assert words.class_section(nothing) is None


def test_plain_cuts_long_lists_and_paths() -> None:
    assert words.plain(list(range(1000))).endswith("23, … (1000 in all)")
    assert words.plain([]) == "—"
    assert words.plain({"20": [3], "path": "/srv/x/y"}) == "20: 3, path: …/y"
    assert words.plain(True) == "yes"
    assert words.plain("/srv/data/cifar10") == "…/cifar10"
    assert words.plain("https://example.org/a/b") == "https://example.org/a/b"


def rendered(summary: dict[str, Any], width: int = 80) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(persistence_table(summary))
    return stream.getvalue().splitlines()


def test_table_says_everything_in_eighty_columns(make_run: Callable[..., Path]) -> None:
    summary = json.loads((make_run(last=1200, half=300.0) / "summary.json").read_text())
    lines = rendered(summary)
    text = "\n".join(lines)
    assert max(len(line) for line in lines) <= 80
    assert "…" not in text
    assert lines[0].strip() == words.verdict(summary).headline
    expected = {words.span(summary["lifespan"][key]) for key in ("0.25", "0.5", "0.75")}
    expected |= {words.percent(value) for key in ("area", "asr_at") for value in summary[key].values()}
    expected |= {words.percent(summary["detection"][key]) for key in ("tpr", "fpr", "malicious_weight")}
    expected |= {words.number(value) for value in summary["detection"]["auroc"].values()}
    expected |= {words.points(value) for value in summary["stealth"].values()}
    for value in expected:
        assert value in text, value


def test_table_names_the_perplexity_where_there_is_one() -> None:
    final = summary_with()["final"]
    text = " ".join("\n".join(rendered(summary_with(final=final | {"perplexity": 88.14}))).split())
    assert "final main accuracy 90.0 %" in text
    assert "final perplexity 88.1" in text
    for of in (final, final | {"perplexity": None, "class_accuracy": [0.5, None]}):  # an older version's, of classes
        assert "perplexity" not in "\n".join(rendered(summary_with(final=of)))


def test_table_leaves_out_ages_beyond_the_run_and_takes_no_markup() -> None:
    summary = summary_with()
    summary["detection"]["auroc"] = {"[bold]mine[/bold]": 0.5}
    text = "\n".join(rendered(summary))
    assert "[bold]mine[/bold]" in text
    head = next(line for line in text.splitlines() if line.startswith("H ="))
    assert head.split() == ["H", "=", "10"]


def test_table_of_a_run_without_attack() -> None:
    empty = {"0.25": None, "0.5": None, "0.75": None}
    summary = summary_with(t0=None, lifespan=empty, half_life=None, time_to_inject=empty)
    text = "\n".join(rendered(summary))
    assert "Nobody attacked" in text
    assert "lifespan" not in text
    assert "90.0\u202f%" in text
