"""The persistence numbers of one run for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich.table import Table
from rich.text import Text

from fedsim.report import words


def persistence_table(summary: Mapping[str, Any]) -> Table:
    """A table of at most 80 columns for the contents of ``summary.json``, headed by the run's verdict."""
    answer = words.verdict(summary)
    whole = Table.grid(padding=(0, 0))
    whole.add_column(overflow="fold", max_width=80)
    whole.add_row(Text(answer.headline, style="bold"))
    whole.add_row(Text(answer.detail, style="dim"))
    by_kappa, by_age, single = words.persistence_sections(summary)
    if summary["t0"] is not None:
        for section, head in ((by_kappa, "κ ="), (by_age, "H =")):
            _add_matrix(whole, section, head)
    whole.add_row("")
    whole.add_row(_pairs([single, *words.stealth_sections(summary)]))
    return whole


def _add_matrix(whole: Table, section: words.Section, head: str) -> None:
    # Empty columns are dropped: horizons that the run never reached would only take room.
    kept = [i for i in range(len(section.columns)) if any(row.values[i] != words.ABSENT for row in section.rows)]
    if not kept:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(head, width=21)
    for i in kept:
        table.add_column(section.columns[i], justify="right", min_width=6)
    for row in section.rows:
        table.add_row(row.name, *(row.values[i] for i in kept))
    whole.add_row("")
    whole.add_row(table)


def _pairs(sections: Sequence[words.Section]) -> Table:
    """Two measures side by side a line."""
    cells = [(Text(s.prefix + row.name), Text(row.values[0])) for s in sections for row in s.rows]
    half = (len(cells) + 1) // 2
    table = Table.grid(padding=(0, 2))
    for column in range(4):
        table.add_column(justify="right" if column % 2 else "left", overflow="fold")
    for left, right in zip_longest(cells[:half], cells[half:], fillvalue=(Text(), Text())):
        table.add_row(*left, *right)
    return table
