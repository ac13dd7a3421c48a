"""The tables of a run: rows on disk as each round ends, Parquet that depends on the seed alone.

Parquet cannot be appended to, so each round goes to ``journal.jsonl`` first (one line, fsynced), and the Parquet
files are rewritten from all rows: after every round while they are small, more rarely as they grow.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.errors import InputError
from fedsim.federation.records import RoundRecord
from fedsim.recording.files import disk_error, write_atomic

ROUNDS = pa.schema(
    [
        ("round", pa.int64()),
        ("main_accuracy", pa.float64()),
        ("main_loss", pa.float64()),
        ("perplexity", pa.float64()),
        ("class_accuracy", pa.list_(pa.float64())),
        ("asr", pa.float64()),
        ("asr_examples", pa.int64()),
        ("malicious_submitted", pa.int64()),
        ("malicious_accepted", pa.int64()),
        ("defense", pa.map_(pa.string(), pa.float64())),
    ]
)
CLIENTS = pa.schema(
    [
        ("round", pa.int64()),
        ("client", pa.int64()),
        ("malicious", pa.bool_()),
        ("examples", pa.int64()),
        ("update_norm", pa.float64()),
        ("accepted", pa.bool_()),
        ("weight", pa.float64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("scores", pa.map_(pa.string(), pa.float64())),
    ]
)
JOURNAL = "journal.jsonl"
_ROWS_PER_REWRITE = 500
"""Client rows for each round that the Parquet files stay behind: rewriting costs the same however long the run."""


def round_row(record: RoundRecord) -> dict[str, Any]:
    m = record.measurement
    return {
        "round": record.round,
        "main_accuracy": m and m.main_accuracy,
        "main_loss": m and m.main_loss,
        "perplexity": m and m.perplexity,
        "class_accuracy": m and m.class_accuracy,
        "asr": m and m.asr,
        "asr_examples": m and m.asr_examples,
        "malicious_submitted": record.malicious_submitted,
        "malicious_accepted": record.malicious_accepted,
        "defense": sorted(m.defense.items()) if m else [],
    }


def client_rows(record: RoundRecord) -> list[dict[str, Any]]:
    return [
        {
            "round": record.round,
            "client": c.client,
            "malicious": c.malicious,
            "examples": c.examples,
            "update_norm": c.update_norm,
            "accepted": c.accepted,
            "weight": c.weight,
            "status": c.status,
            "reason": c.reason,
            "scores": sorted(c.scores.items()),
        }
        for c in record.clients
    ]


def timing_row(record: RoundRecord) -> dict[str, Any]:
    named = {k if k.startswith("attack_") else f"seconds_{k}": v for k, v in record.seconds.items()}
    return {"round": record.round, **named}


class ClientRows:
    """The rows of the clients, kept as columns but for the newest: a run of many rounds has very many of them."""

    _NEWEST = 1000

    def __init__(self) -> None:
        self._columns: list[pa.Table] = []
        self._newest: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return sum(len(part) for part in self._columns) + len(self._newest)

    def extend(self, rows: list[dict[str, Any]]) -> None:
        self._newest += rows
        if len(self._newest) >= self._NEWEST:
            self._columns.append(pa.Table.from_pylist(self._newest, schema=CLIENTS))
            self._newest = []

    def table(self) -> pa.Table:
        newest = pa.Table.from_pylist(self._newest, schema=CLIENTS)
        return pa.concat_tables([*self._columns, newest]).combine_chunks()


class Tables:
    """The rows of one run, in memory and on disk.

    Raises
    ------
    RunError: the disk is full. InputError: an existing journal is damaged before its last line.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rounds: list[dict[str, Any]] = []
        self.clients = ClientRows()
        self.timings: list[dict[str, Any]] = []

    def resume(self, last: int) -> None:
        """Take over the journal's rows up to round ``last``; drop the rest (they are played again)."""
        path = self.directory / JOURNAL
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = []
        for i, line in enumerate(lines):
            try:
                entry = json.loads(line)
                beyond = entry["round"]["round"] > last
                if not beyond:
                    self._take(entry)
            except (ValueError, LookupError, TypeError, RecursionError):
                if i == len(lines) - 1:
                    break  # the line a kill cut short
                raise InputError(f"{path} is damaged in line {i + 1}; start the run anew") from None
            if beyond:
                break
            kept.append(line)
        if len(self.rounds) != last:
            raise InputError(f"{path} holds {len(self.rounds)} rounds, the checkpoint {last}; start the run anew")
        write_atomic(path, lambda temporary: temporary.write_bytes(b"".join(line + b"\n" for line in kept)))

    def add(self, record: RoundRecord) -> None:
        """Put a finished round on disk."""
        entry = {"round": round_row(record), "clients": client_rows(record), "timings": timing_row(record)}
        self._take(entry)
        path = self.directory / JOURNAL
        try:
            with path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(entry) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise disk_error(path, error) from error
        if record.round % (1 + len(self.clients) // _ROWS_PER_REWRITE) == 0:
            self.write(sync=False)  # the journal is what a resumed run goes by

    def write(self, *, sync: bool = True) -> None:
        """Rewrite the Parquet files from all rows."""
        names = ["round", *sorted({key for row in self.timings for key in row} - {"round"})]
        timings = pa.schema([(n, pa.int64() if n == "round" else pa.float64()) for n in names])
        for name, table in (
            ("rounds", pa.Table.from_pylist(self.rounds, schema=ROUNDS)),
            ("clients", self.clients.table()),
            ("timings", pa.Table.from_pylist(self.timings, schema=timings)),
        ):
            write_atomic(self.directory / f"{name}.parquet", lambda path, t=table: pq.write_table(t, path), sync=sync)  # type: ignore[misc]

    def finish(self) -> None:
        """Write the Parquet files and remove the journal: the run is complete."""
        self.write()
        (self.directory / JOURNAL).unlink(missing_ok=True)

    def _take(self, entry: dict[str, Any]) -> None:
        one, timings = {**entry["round"], "defense": list(map(tuple, entry["round"]["defense"]))}, entry["timings"]
        clients = [{**row, "scores": list(map(tuple, row["scores"]))} for row in entry["clients"]]  # JSON has lists
        self.rounds.append(one)
        self.clients.extend(clients)
        self.timings.append(timings)
