"""The tables: a line on disk per round, and Parquet that depends on the rows alone."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsim.errors import InputError, RunError
from fedsim.federation.evaluation import Measurement
from fedsim.federation.records import ClientRecord, RoundRecord
from fedsim.recording import tables as module
from fedsim.recording.tables import JOURNAL, Tables

NAN = float("nan")


def a_record(round: int, clients: int = 3) -> RoundRecord:
    """A round of everything that can happen: evaluated every second round, a NaN score, a client of each status.

    No one task has both, but here a perplexity stands beside accuracies per class, one of a class without examples.
    """
    measurement = None
    if round % 2:
        asr, examples = (NAN, 0) if round == 3 else (0.5, 40)
        by_class = (1 / 3, NAN, 1.0) if round == 3 else None
        measurement = Measurement(0.1 * round, 1 / round, asr, examples, 88.1 if round == 1 else None, by_class)
        measurement.defense.update({"crfl.radius": 0.25} if round == 1 else {})
    rows = [
        ClientRecord(0, True, 11, "ok", 1.5, True, 0.25, {"krum.distance": 1 / 3, "a.b": NAN}),
        ClientRecord(1, False, 12, "dropped"),
        ClientRecord(2, False, 0, "rejected", reason="an update that is not finite — naïve, 100 % \n"),
    ]
    rows += [
        ClientRecord(c, False, c, "ok", 0.5, True, 0.5, {"krum.distance": float("inf")}) for c in range(3, clients)
    ]
    seconds = {"train": 0.5, "total": 1.0, **({"evaluate": 0.1} if measurement else {}), "attack_mask": 2.0}
    return RoundRecord(round, rows, measurement, seconds)


def filled(directory: Path, rounds: int = 4) -> Tables:
    tables = Tables(directory)
    tables.resume(0)
    for round in range(1, rounds + 1):
        tables.add(a_record(round))
    return tables


def parquet(directory: Path) -> dict[str, bytes]:
    return {name: (directory / f"{name}.parquet").read_bytes() for name in ("rounds", "clients", "timings")}


# ------------------------------------------------------------------------------------------------------- Parquet


def test_the_schema_is_as_documented(tmp_path: Path) -> None:
    filled(tmp_path).finish()
    text, number = "string", "double"
    assert {f.name: str(f.type).replace(" ('defense')", "") for f in pq.read_schema(tmp_path / "rounds.parquet")} == {
        "round": "int64",
        "main_accuracy": number,
        "main_loss": number,
        "perplexity": number,
        "class_accuracy": "list<element: double>",
        "asr": number,
        "asr_examples": "int64",
        "malicious_submitted": "int64",
        "malicious_accepted": "int64",
        "defense": "map<string, double>",
    }
    assert {f.name: str(f.type).replace(" ('scores')", "") for f in pq.read_schema(tmp_path / "clients.parquet")} == {
        "round": "int64",
        "client": "int64",
        "malicious": "bool",
        "examples": "int64",
        "update_norm": number,
        "accepted": "bool",
        "weight": number,
        "status": text,
        "reason": text,
        "scores": "map<string, double>",
    }
    assert {f.name: str(f.type) for f in pq.read_schema(tmp_path / "timings.parquet")} == {
        "round": "int64",
        "attack_mask": number,
        "seconds_evaluate": number,
        "seconds_total": number,
        "seconds_train": number,
    }


@pytest.mark.parametrize("newest", [1, 7, 10_000])
def test_how_rows_are_kept_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newest: int) -> None:
    (tmp_path / "a").mkdir()
    filled(tmp_path / "a", rounds=20).finish()
    monkeypatch.setattr(module.ClientRows, "_NEWEST", newest)
    (tmp_path / "b").mkdir()
    tables = filled(tmp_path / "b", rounds=20)
    assert len(tables.clients) == 60
    tables.finish()
    assert parquet(tmp_path / "a") == parquet(tmp_path / "b")


def test_what_went_in_comes_out(tmp_path: Path) -> None:
    filled(tmp_path).finish()
    rounds = pq.read_table(tmp_path / "rounds.parquet").to_pylist()
    assert rounds[0] == {
        "round": 1,
        "main_accuracy": 0.1,
        "main_loss": 1.0,
        "perplexity": 88.1,
        "class_accuracy": None,
        "asr": 0.5,
        "asr_examples": 40,
        "malicious_submitted": 1,
        "malicious_accepted": 1,
        "defense": [("crfl.radius", 0.25)],
    }
    measured = ("main_accuracy", "main_loss", "perplexity", "class_accuracy", "asr", "asr_examples")
    assert {rounds[1][key] for key in measured} == {None}
    assert rounds[2]["perplexity"] is None
    assert rounds[2]["class_accuracy"][::2] == [1 / 3, 1.0]
    assert math.isnan(rounds[2]["class_accuracy"][1]), "a class without test examples: not the same as none measured"
    assert math.isnan(rounds[2]["asr"]), "measured, but on nothing: not the same as not measured"
    assert rounds[2]["asr_examples"] == 0
    clients = pq.read_table(tmp_path / "clients.parquet").to_pylist()
    assert len(clients) == 12
    scores = dict(clients[0]["scores"])
    assert list(scores) == ["a.b", "krum.distance"], "in the order of their names"
    assert scores["krum.distance"] == 1 / 3
    assert math.isnan(scores["a.b"])
    assert clients[1] == {
        "round": 1,
        "client": 1,
        "malicious": False,
        "examples": 12,
        "update_norm": None,
        "accepted": False,
        "weight": 0.0,
        "status": "dropped",
        "reason": "",
        "scores": [],
    }
    assert clients[2]["reason"] == "an update that is not finite — naïve, 100 % \n"
    timings = pd.read_parquet(tmp_path / "timings.parquet")
    assert timings["seconds_evaluate"].isna().tolist() == [False, True, False, True]


def test_files_open_as_data_frames(tmp_path: Path) -> None:
    filled(tmp_path).finish()
    frame = pd.read_parquet(tmp_path / "rounds.parquet")
    assert frame["round"].tolist() == [1, 2, 3, 4]
    assert frame["asr"].isna().tolist() == [False, True, True, True]


def test_a_run_without_rounds_has_empty_tables(tmp_path: Path) -> None:
    filled(tmp_path, 0).finish()
    assert pq.read_table(tmp_path / "rounds.parquet").num_rows == 0
    assert pq.read_table(tmp_path / "clients.parquet").num_rows == 0


def test_bytes_do_not_depend_on_how_often_they_were_written(tmp_path: Path) -> None:
    once, often, resumed = (tmp_path / name for name in ("once", "often", "resumed"))
    for directory in (once, often, resumed):
        directory.mkdir()
    tables = Tables(once)
    for record in map(a_record, range(1, 5)):
        rows = {"round": module.round_row(record), "clients": module.client_rows(record)}
        tables._take({**rows, "timings": module.timing_row(record)})
    tables.finish()
    filled(often).finish()
    filled(resumed, 3)
    again = Tables(resumed)
    again.resume(2)
    again.add(a_record(3))
    again.add(a_record(4))
    again.finish()
    assert parquet(often) == parquet(once)
    assert parquet(resumed) == parquet(once)


def test_a_journal_of_an_older_version_is_taken_over(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    lines = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    for line in lines:
        del line["round"]["perplexity"], line["round"]["class_accuracy"]
    (tmp_path / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables = Tables(tmp_path)
    tables.resume(3)
    tables.add(a_record(4))
    tables.add(a_record(5))
    tables.finish()
    rounds = pq.read_table(tmp_path / "rounds.parquet")
    assert rounds.schema == module.ROUNDS
    assert rounds["class_accuracy"].to_pylist() == [None] * 5
    assert rounds["main_accuracy"].to_pylist() == [0.1, None, 0.1 * 3, None, 0.5]


# ------------------------------------------------------------------------------------------------------- journal


def test_every_round_is_a_line_on_disk_when_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd))[1])
    tables = Tables(tmp_path)
    tables.resume(0)
    for round in range(1, 4):
        synced.clear()
        tables.add(a_record(round))
        lines = (tmp_path / JOURNAL).read_text().splitlines()
        assert [json.loads(line)["round"]["round"] for line in lines] == list(range(1, round + 1))
        assert (tmp_path / JOURNAL).stat().st_ino in synced
        assert pq.read_table(tmp_path / "rounds.parquet").num_rows == round, "small tables are rewritten every round"


def test_the_journal_goes_when_the_run_is_complete(tmp_path: Path) -> None:
    filled(tmp_path).finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clients.parquet", "rounds.parquet", "timings.parquet"]


def test_large_tables_are_rewritten_more_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_PER_REWRITE", 10)
    tables = Tables(tmp_path)
    written = []
    monkeypatch.setattr(tables, "write", lambda *, sync: written.append(len(tables.rounds)))
    for round in range(1, 31):
        tables.add(a_record(round))
    assert written[:3] == [1, 2, 3]
    assert len(written) < 15
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 30, "the journal has every round all the same"


def test_resuming_takes_over_rounds_and_forgets_later_ones(tmp_path: Path) -> None:
    filled(tmp_path)
    tables = Tables(tmp_path)
    tables.resume(2)
    assert [row["round"] for row in tables.rounds] == [1, 2]
    assert len(tables.clients) == 6
    assert len(tables.timings) == 2
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 2


@pytest.mark.parametrize("keep", [0, 1, 30, -20, -2, -1])
def test_a_last_line_cut_short_is_ignored(tmp_path: Path, keep: int) -> None:
    filled(tmp_path, 3)
    path = tmp_path / JOURNAL
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second + third[:keep])
    tables = Tables(tmp_path)
    tables.resume(2)
    assert len(tables.rounds) == 2
    assert path.read_bytes() == first + second, "nothing is appended to half a line"


@pytest.mark.parametrize(
    "damage",
    [b"\x00" * 40, b"{", b"\xff\xfe\xff", b"17", b"null", b"[]", b'{"round": {}}', b"[" * 100_000, b'{"round": 3}'],
    ids=["zeros", "cut", "no UTF-8", "number", "null", "list", "no round", "deep", "wrong type"],
)
def test_a_damaged_line_in_the_middle_is_reported(tmp_path: Path, damage: bytes) -> None:
    filled(tmp_path, 3)
    path = tmp_path / JOURNAL
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2], b""]))
    with pytest.raises(InputError, match=r"journal.jsonl is damaged in line 2; start the run anew"):
        Tables(tmp_path).resume(3)


def test_a_journal_shorter_than_the_checkpoint_is_reported(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    with pytest.raises(InputError, match=r"holds 2 rounds, the checkpoint 3; start the run anew"):
        Tables(tmp_path).resume(3)


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    Tables(tmp_path).resume(0)
    assert (tmp_path / JOURNAL).read_bytes() == b""
    with pytest.raises(InputError, match="holds 0 rounds"):
        Tables(tmp_path).resume(1)


# ----------------------------------------------------------------------------------------------------- accidents


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("name", [JOURNAL, "rounds.parquet", "clients.parquet", "timings.parquet"])
def test_a_full_disk_is_reported_and_what_was_there_stays(tmp_path: Path, name: str) -> None:
    tables = filled(tmp_path, 2)
    before = parquet(tmp_path)
    if name == JOURNAL:
        (tmp_path / JOURNAL).unlink()
        (tmp_path / JOURNAL).symlink_to("/dev/full")
    else:
        (tmp_path / f".{name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(RunError, match=f"^the disk is full: {name} could not be written; free some room"):
        tables.add(a_record(3))
    assert {n: b for n, b in parquet(tmp_path).items() if f"{n}.parquet" == name} == {
        n: b for n, b in before.items() if f"{n}.parquet" == name
    }
    assert not list(tmp_path.glob(".*.tmp"))
    for table in ("rounds", "clients", "timings"):
        pq.read_table(tmp_path / f"{table}.parquet")


def test_a_table_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    tables = filled(tmp_path, 2)
    before = parquet(tmp_path)
    tables.rounds.append({"round": "no number"})
    with pytest.raises(pa.ArrowException):
        tables.write()
    assert parquet(tmp_path) == before


def test_rows_hold_plain_values(tmp_path: Path) -> None:
    def plain(value: Any) -> bool:
        return json.loads(json.dumps(value)) is not None

    assert plain(module.round_row(a_record(1)))
    assert plain(module.client_rows(a_record(1)))
    assert plain(module.timing_row(a_record(1)))
