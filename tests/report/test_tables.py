"""The tables for a paper: what is in them, what is bold, and that no name can break them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedsim.report import tables
from fedsim.report.tables import latex, latex_text, markdown, markdown_text, write_tables

NAN = math.nan
HOSTILE = "a|b`c*d_e<script>alert(1)</script>\n| x [y](z) \\"


def results(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Results with the columns the tables look at; what a row leaves out is as in the first lines here."""
    usual = {"task": "vision / digits", "model": "cnn", "attack": "pgd", "trigger": "patch", "schedule": "once"}
    more = {"partition": "iid", "settings": "", "seed": 0, "undefended": False, "status": "complete", "t0": 9.0}
    life = {"lifespan_50": 5.0, "lifespan_50_censored": False, "tpr": 0.5, "fpr": 0.25}
    numbers = {"main_accuracy": 0.9, "asr": 0.5}
    return pd.DataFrame([usual | more | life | numbers | {"run": f"r{i}"} | row for i, row in enumerate(rows)])


def columns(text: str, title: str) -> dict[str, list[str]]:
    """Defense → cells of the Markdown table under a title."""
    lines = text.split(f"### {title}\n\n")[1].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in [rows[0], *rows[2:]]}


ASR, ACCURACY, LIFE = "ASR at the end, %", "Main accuracy, %", "Lifespan at κ = 50 %, rounds"


def test_a_table_is_defense_by_attack_with_fedavg_first() -> None:
    rows = [
        {"defense": d, "attack": a, "asr": asr, "undefended": d == "fedavg"}
        for d, a, asr in (("alignins", "pgd", 0.1), ("fedavg", "alie", 0.75), ("fedavg", "pgd", 0.5))
    ]
    found = columns(markdown(results(rows)), ASR)
    assert found == {"defense": ["alie", "pgd"], "fedavg": ["75.0", "50.0"], "alignins": ["–", "**10.0**"]}
    assert list(found) == ["defense", "fedavg", "alignins"]


def test_values_are_medians_with_intervals_and_seeds() -> None:
    rows = [{"defense": "krum", "asr": asr, "seed": i} for i, asr in enumerate((0.1, 0.2, 0.6))]
    rows += [{"defense": "rfa", "asr": asr, "seed": i} for i, asr in enumerate((0.3, 0.4))]
    rows += [{"defense": "alie", "asr": 0.3, "seed": i, "attack": "b"} for i in range(3)]
    text = markdown(results(rows))
    found = columns(text, ASR)
    assert found["krum"] == ["–", "**20.0** [10.0, 60.0]"]
    assert found["rfa"] == ["–", "35.0 [30.0, 40.0] (n = 2)"]
    assert "Median over 3 seeds [95 % bootstrap interval]. An interval over so few seeds" in text
    single = markdown(results([{"defense": "krum"}]))
    assert "One seed." in single
    assert "interval" not in single
    many = markdown(results([{"defense": "krum", "asr": i / 10, "seed": i} for i in range(6)]))
    assert "so few" not in many


@pytest.mark.parametrize(
    ("title", "column", "values", "bold"),
    [
        (ASR, "asr", [0.5, 0.2, 0.2], [False, True, True]),
        (ASR, "asr", [0.50001, 0.50002, 0.9], [True, True, False]),  # the same as printed
        (ASR, "asr", [0.5, 0.5, 0.5], [False, False, False]),
        (ACCURACY, "main_accuracy", [0.5, 0.2, 0.7], [False, False, True]),
        ("TPR, %", "tpr", [0.1, 0.2, 0.2], [False, True, True]),
        ("FPR, %", "fpr", [0.1, 0.2, 0.2], [True, False, False]),
    ],
)
def test_the_best_value_of_a_column_is_bold(title: str, column: str, values: list[float], bold: list[bool]) -> None:
    frame = results([{"defense": f"d{i}", column: value} for i, value in enumerate(values)])
    found = columns(markdown(frame), title)
    assert [found[f"d{i}"][0].startswith("**") for i in range(len(values))] == bold
    assert latex(frame).count("\\textbf{") == sum(bold)


def test_each_column_has_its_own_best() -> None:
    rows = [
        {"defense": d, "attack": a, "asr": asr}
        for d, a, asr in (("a", "x", 0.1), ("a", "y", 0.9), ("b", "x", 0.2), ("b", "y", 0.8))
    ]
    assert columns(markdown(results(rows)), ASR) == {
        "defense": ["x", "y"],
        "a": ["**10.0**", "90.0"],
        "b": ["20.0", "**80.0**"],
    }


def test_a_defense_that_turns_nobody_away_has_no_best_fpr() -> None:
    rows = [
        {"defense": "clip", "tpr": 0.0, "fpr": 0.0},
        {"defense": "krum", "fpr": 0.3},
        {"defense": "rfa", "fpr": 0.4},
    ]
    found = columns(markdown(results(rows)), "FPR, %")
    assert found == {"defense": ["pgd"], "clip": ["0.0"], "krum": ["**30.0**"], "rfa": ["40.0"]}


def lives(*values: tuple[float, bool]) -> list[str]:
    rows = [{"defense": f"d{i}", "lifespan_50": v, "lifespan_50_censored": c} for i, (v, c) in enumerate(values)]
    return [cells[0] for name, cells in columns(markdown(results(rows)), LIFE).items() if name != "defense"]


def test_censored_lifespans_are_bounds_and_never_the_best() -> None:
    assert lives((10, False), (20, True)) == ["**10**", "&gt; 20"]
    assert lives((10, False), (5, True)) == ["10", "&gt; 5"]  # it may have lived longer or shorter than 10
    assert lives((10, True), (5, True)) == ["&gt; 10", "&gt; 5"]
    assert lives((10, False), (10, True)) == ["**10**", "&gt; 10"]


def test_lifespans_are_kaplan_meier_medians() -> None:
    rows = [
        {"defense": "a", "seed": i, "lifespan_50": life, "lifespan_50_censored": cut}
        for i, (life, cut) in enumerate(((3.0, False), (5.0, True), (8.0, False)))
    ]
    text = markdown(results(rows))
    assert columns(text, LIFE)["a"] == ["8 [3, –]"]
    assert "Kaplan–Meier median over 3 seeds [95 % interval]" in text
    assert "bound was not reached" in text


def test_a_cell_without_numbers_says_why() -> None:
    none = {"main_accuracy": NAN, "asr": NAN}
    rows = [
        {"defense": "a"},
        {"defense": "b", "status": "failed", **none},
        {"defense": "c", "status": "running", **none},
    ]
    assert columns(markdown(results(rows)), ASR) == {
        "defense": ["pgd"],
        "a": ["50.0"],
        "b": ["failed"],
        "c": ["unfinished"],
    }


def test_attacks_with_several_triggers_are_columns_of_their_own() -> None:
    rows = [{"defense": "a", "trigger": t, "schedule": "once"} for t in ("patch", "blend")]
    assert columns(markdown(results(rows)), ASR)["defense"] == ["pgd × blend", "pgd × patch"]
    implied = [{"defense": "a", "attack": a, "trigger": t} for a, t in (("x", "patch"), ("y", "blend"))]
    assert columns(markdown(results(implied)), ASR)["defense"] == ["x", "y"]


def test_tasks_and_settings_have_tables_of_their_own() -> None:
    rows = [
        {"defense": "a", "task": t, "settings": s, "axis.share": x}
        for t, s, x in (("v", "lr=1", "5"), ("w", "lr=2", "9"))
    ]
    text = markdown(results(rows))
    assert re.findall(r"^## (.*)$", text, re.M) == ["v, cnn, share 5, lr=1", "w, cnn, share 9, lr=2"]
    assert text.count(f"### {ASR}") == 2
    assert "iid" not in text  # the same everywhere


def test_the_rank_has_a_table() -> None:
    rows = [{"defense": "fedavg", "undefended": True}, {"defense": "krum", "asr": 0.25, "main_accuracy": 0.81}]
    found = columns(markdown(results(rows)), "Rank over attacks")
    assert found == {"defense": ["rank", "attacks"], "krum": ["**+0.40**", "1"], "fedavg": ["+0.00", "1"]}
    rows += [{"defense": "fedavg", "undefended": True, "attack": "b"}]
    assert columns(markdown(results(rows)), "Rank over attacks")["krum"] == ["–", "1 (1 missing)"]


def test_no_runs_make_no_table() -> None:
    empty = results([{"defense": "a"}]).iloc[:0]
    assert markdown(empty) == "No run has numbers yet.\n"
    assert latex(empty).startswith("%")


def test_latex_is_booktabs_with_as_many_cells_as_columns() -> None:
    rows = [{"defense": d, "attack": a, "seed": s, "asr": s / 4} for d in "ab" for a in "xyz" for s in range(3)]
    text = latex(results(rows))
    assert text.count("\\begin{table}") == text.count("\\end{table}") == text.count("\\bottomrule") == 5
    bodies = re.findall(r"\\begin\{tabular\}\{(lr*)\}(.*?)\\end\{tabular\}", text, re.S)
    assert len(bodies) == 5
    for layout, body in bodies:
        lines = [line for line in body.splitlines() if line.endswith("\\\\")]
        assert len(lines) == 3
        assert all(line.count("&") == len(layout) - 1 == 3 for line in lines)
    assert "25.0 [0.0, 50.0]" in text
    assert "$\\kappa$ = 50 \\%" in text


@pytest.mark.parametrize("column", ["defense", "attack", "task"])
def test_names_cannot_break_a_table(column: str) -> None:
    frame = results([{"defense": "a"} | {column: HOSTILE}])
    text = markdown(frame)
    assert "<script" not in text
    assert markdown_text(HOSTILE) in text
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in text.splitlines() if line.startswith("|"))
    made = latex(frame)
    assert latex_text(HOSTILE) in made
    assert all(line.count("&") <= 1 for line in made.splitlines())


def test_escaping_character_by_character() -> None:
    assert markdown_text("a_b*c|d`e\\f[g]#~{}") == r"a\_b\*c\|d\`e\\f\[g\]\#\~\{\}"
    assert markdown_text("<b>&amp;\n\x1b[0m") == r"&lt;b&gt;&amp;amp; \[0m"
    assert latex_text("50% of $x_1 & {y}#") == r"50\% of \$x\_1 \& \{y\}\#"
    assert latex_text("\\^~<>|") == (
        r"\textbackslash{}\textasciicircum{}\textasciitilde{}\textless{}\textgreater{}\textbar{}"
    )
    assert latex_text("[1] *\n× κ −1 – x") == r"{[}1{]} {*} $\times$ $\kappa$ $-$1 -- x"


def test_both_files_are_written(tmp_path: Path) -> None:
    frame = results([{"defense": "a"}])
    write_tables(frame, tmp_path / "new")
    assert (tmp_path / "new" / "tables.md").read_text(encoding="utf-8") == markdown(frame)
    assert (tmp_path / "new" / "tables.tex").read_text(encoding="utf-8") == latex(frame)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tables.md", "tables.tex"]


def test_every_metric_is_one_of_the_results() -> None:
    from fedsim.recording.results import MEASURES

    assert {metric.column for metric in tables.METRICS} <= set(MEASURES)
