"""The summary of a run, on tables small enough to work out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedsim.recording.summary import auroc, score_table, summarise
from tests.support.runs import SUMMARY_KEYS

NAN = float("nan")
NOT_COUNTED = {"perplexity": None, "class_accuracy": None}
"""What a table without their columns has of them: one of an older version."""


def rounds_of(asr: list[float], submitted: list[int], accuracy: list[float] | None = None) -> pd.DataFrame:
    n = len(asr)
    return pd.DataFrame(
        {
            "round": range(1, n + 1),
            "main_accuracy": accuracy or [0.9] * n,
            "main_loss": [0.5] * n,
            "asr": asr,
            "asr_examples": pd.array([100] * n, dtype="Int64"),
            "malicious_submitted": submitted,
            "malicious_accepted": submitted,
        }
    )


def clients_of(*rows: tuple[int, bool, bool, float, str, Any]) -> pd.DataFrame:
    columns = ["round", "malicious", "accepted", "weight", "status", "scores"]
    table = pd.DataFrame(list(rows), columns=columns)
    return table.assign(client=range(len(table)), examples=10, update_norm=1.0)


NO_CLIENTS = clients_of()


def test_every_number_of_a_small_run() -> None:
    rounds = rounds_of(
        asr=[0.1, 0.6, 0.9, 0.8, 0.4, 0.2],
        submitted=[0, 1, 2, 0, 0, 0],
        accuracy=[0.5, 0.6, 0.7, 0.8, 0.85, 0.9],
    )
    twin = rounds_of([0.1] * 6, [0] * 6, accuracy=[0.5, 0.7, 0.75, 0.8, 0.85, 0.88])
    clients = clients_of(
        (1, False, True, 1.0, "ok", None),
        (2, True, True, 0.25, "ok", None),
        (2, False, True, 0.75, "ok", None),
        (3, True, True, 0.5, "ok", None),
        (3, True, False, 0.0, "ok", None),
        (3, False, True, 0.5, "ok", None),
    )
    summary = summarise(rounds, clients, twin=twin, horizons=(1, 3, 10))
    assert set(summary) == SUMMARY_KEYS
    assert summary["t0"] == 3
    assert summary["lifespan"] == {
        "0.25": {"rounds": 2, "censored": False, "first_crossing": {"rounds": 3, "censored": False}},
        "0.5": {"rounds": 1, "censored": False, "first_crossing": {"rounds": 2, "censored": False}},
        "0.75": {"rounds": 1, "censored": False, "first_crossing": {"rounds": 2, "censored": False}},
    }
    assert summary["half_life"] == {"rounds": 2, "censored": False}  # excess 0.8, 0.7, 0.3
    assert summary["floor"] == "clean twin"
    assert summary["area"] == {"1": 0.8, "3": pytest.approx(1.4 / 3), "10": None}
    assert summary["asr_at"] == {"1": 0.8, "3": 0.2, "10": None}
    assert summary["time_to_inject"] == {"0.25": 1, "0.5": 1, "0.75": 3}
    assert summary["final"] == NOT_COUNTED | {"round": 6, "main_accuracy": 0.9, "main_loss": 0.5, "asr": 0.2}
    assert summary["stealth"] == {
        "attack_rounds": pytest.approx(-0.075),  # −0.1 and −0.05
        "at_t0": pytest.approx(-0.05),
        "final": pytest.approx(0.02),
    }
    assert summary["detection"]["malicious_weight"] == pytest.approx(0.375)  # 0.25 and 0.5
    assert summary["detection"]["tpr"] == pytest.approx(1 / 3)
    assert summary["detection"]["fpr"] == 0
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_without_a_twin_the_floor_is_zero_and_says_so() -> None:
    summary = summarise(rounds_of([0.8, 0.5, 0.4], [1, 0, 0]), NO_CLIENTS)
    assert summary["floor"] == "assumed 0"
    assert summary["stealth"] is None
    assert summary["half_life"] == {"rounds": 2, "censored": False}


def test_without_an_attack_nothing_is_made_up() -> None:
    clients = clients_of((1, False, False, 0.0, "ok", [("s", 1.0)]), (2, False, True, 1.0, "ok", [("s", 2.0)]))
    summary = summarise(rounds_of([0.9, 0.9], [0, 0]), clients, twin=rounds_of([0.1, 0.1], [0, 0]))
    assert set(summary) == SUMMARY_KEYS
    assert summary["t0"] is None
    assert summary["half_life"] is None
    for key in ("lifespan", "area", "asr_at", "time_to_inject"):
        assert set(summary[key].values()) == {None}, key
    assert summary["final"]["asr"] == 0.9
    assert summary["stealth"] == {"attack_rounds": None, "at_t0": None, "final": 0.0}
    assert summary["detection"] == {
        "auroc": {},
        "tpr": None,
        "fpr": 0.5,
        "fpr_attack_rounds": None,
        "malicious_weight": None,
    }


def test_rounds_that_were_not_evaluated() -> None:
    rounds = rounds_of([NAN, 0.9, NAN, 0.6, NAN], [0, 1, 0, 0, 0], accuracy=[NAN, 0.7, NAN, 0.8, NAN])
    summary = summarise(rounds.iloc[::-1], NO_CLIENTS, horizons=(1, 2))
    assert summary["lifespan"]["0.5"]["rounds"] == 2
    assert summary["lifespan"]["0.5"]["censored"] is True
    assert summary["asr_at"] == {"1": None, "2": 0.6}
    assert summary["final"] == NOT_COUNTED | {"round": 4, "main_accuracy": 0.8, "main_loss": 0.5, "asr": 0.6}
    nothing = summarise(rounds_of([NAN], [1], accuracy=[NAN]), NO_CLIENTS)
    assert nothing["final"] == NOT_COUNTED | {"round": None, "main_accuracy": None, "main_loss": None, "asr": None}
    assert nothing["lifespan"]["0.5"] is None


def test_what_a_task_counts_beside_accuracy_is_that_of_the_last_evaluated_round(tmp_path: Path) -> None:
    rounds = rounds_of([0.1, 0.2, NAN], [0, 1, 0], accuracy=[0.5, 0.6, NAN])
    words = rounds.assign(perplexity=[90.0, 80.5, NAN], class_accuracy=[None] * 3)
    assert summarise(words, NO_CLIENTS)["final"]["perplexity"] == 80.5
    assert summarise(words, NO_CLIENTS)["final"]["class_accuracy"] is None
    unknown = summarise(words.assign(perplexity=[90.0, NAN, NAN]), NO_CLIENTS)["final"]
    assert unknown["perplexity"] is None, "not that of a round before"

    classes = rounds.assign(perplexity=[NAN] * 3, class_accuracy=[[0.1, 0.2], [0.25, NAN], None])
    classes.to_parquet(tmp_path / "rounds.parquet")
    for table in (classes, pd.read_parquet(tmp_path / "rounds.parquet")):  # of lists, of arrays
        final = summarise(table, NO_CLIENTS)["final"]
        assert final["class_accuracy"] == [0.25, None], "no test examples: null"
        assert final["perplexity"] is None
        assert json.loads(json.dumps(final, allow_nan=False)) == final


def test_detection_counts_what_reached_the_server() -> None:
    clients = clients_of(
        # attack round: one attacker caught, one refused before the defense, one accepted; one lost on the way
        (1, True, False, 0.0, "ok", [("d", 3.0)]),
        (1, True, True, 0.0, "rejected", None),
        (1, True, True, 0.3, "ok", [("d", 1.0)]),
        (1, True, False, NAN, "dropped", None),
        (1, False, True, 0.3, "ok", [("d", 2.0)]),
        (1, False, True, 0.4, "ok", [("d", 0.0)]),
        (1, False, False, 0.0, "ok", [("d", 1.0)]),
        (1, False, False, NAN, "straggler", None),
        # no attacker: counts for the false alarms of all rounds, not for AUROC
        (2, False, True, 1.0, "ok", [("d", 99.0)]),
        # the only attacker never submitted: no attack round
        (3, True, False, NAN, "failed", None),
        (3, False, False, 1.0, "ok", [("d", 99.0)]),
    )
    detection = summarise(rounds_of([0.1, 0.1, 0.1], [3, 0, 0]), clients)["detection"]
    # (3 and 1) against (2, 0 and 1): 3 + (0 + 1 + ½) of 6 pairs
    assert detection["auroc"] == {"d": pytest.approx(0.75)}
    assert detection["tpr"] == pytest.approx(2 / 3)
    assert detection["fpr"] == pytest.approx(2 / 5)
    assert detection["fpr_attack_rounds"] == pytest.approx(1 / 3)
    assert detection["malicious_weight"] == pytest.approx(0.3)


def test_auroc_by_hand() -> None:
    malicious = pd.Series([True, True, False, False])
    assert auroc(pd.Series([4.0, 3.0, 2.0, 1.0]), malicious) == 1
    assert auroc(pd.Series([1.0, 2.0, 3.0, 4.0]), malicious) == 0
    assert auroc(pd.Series([1.0, 1.0, 1.0, 1.0]), malicious) == 0.5
    assert auroc(pd.Series([np.inf, 1.5, 2.0, -np.inf]), malicious) == 0.75
    assert auroc(pd.Series([5.0, NAN, 6.0, 1.0]), malicious) == 0.5
    assert auroc(pd.Series([NAN, NAN, 6.0, 1.0]), malicious) is None
    assert auroc(pd.Series([NAN] * 4), malicious) is None


def test_scores_come_as_pairs_or_dicts_or_not_at_all() -> None:
    table = score_table(pd.DataFrame({"scores": [[("b", 1.0), ("a", None)], {"a": 2.0}, None, []]}, index=[3, 5, 7, 9]))
    assert list(table) == ["a", "b"]
    assert list(table.index) == [3, 5, 7, 9]
    assert table["a"].tolist()[1] == 2.0
    assert table.isna().to_numpy().tolist() == [[True, False], [False, True], [True, True], [True, True]]


def test_malicious_weight_of_a_round_that_was_rejected_whole_is_zero() -> None:
    clients = clients_of((1, True, False, 0.0, "ok", None), (2, True, True, 0.5, "ok", None))
    detection = summarise(rounds_of([0.1, 0.1], [1, 1]), clients)["detection"]
    assert detection["malicious_weight"] == 0.25
    assert detection["fpr"] is None
