"""The page of many runs: right numbers in the right cells, alone, and safe to open whatever a config says."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from fedsim.errors import InputError
from fedsim.recording.results import collect
from fedsim.report import grid, grid_figures, grid_panels, grid_pictures, words, write_grid_report
from fedsim.report.grid_cut import Slice, slices
from fedsim.report.statistics import Interval
from tests.support.places import script

HOSTILE = "<script>alert('gotcha')</script>\"><img src=x onerror=alert(1)>"
VOID = {"meta", "link", "input", "br", "hr", "img", "wbr"}
STEMS = {"survival", "asr_curves", "tradeoff", "roc", "scores", "heat_asr", "heat_life", "heat_cost"}


synthetic = script("benchmarks/report_page.py")
"""The benchmark of this page, which writes made-up runs."""


class Page(HTMLParser):
    """The page taken apart: tables as lists of rows of texts; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()
        if tag in ("b", "small") and {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += " "

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
            return
        if self.open and self.open[-1] == "style":
            return
        self.words.append(data)
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def links(self) -> list[str]:
        """Where the page leads, apart from itself."""
        return [a["href"] for tag, a in self.tags if tag == "a" and not a.get("href", "#").startswith("#")]

    def having(self, identifier: str) -> list[tuple[str, dict[str, str]]]:
        return [(tag, attrs) for tag, attrs in self.tags if attrs.get("id") == identifier]


def numbers_of(root: Path) -> Page:
    """The page without its figures, which take most of the time."""
    out = root / "report"
    frame = collect([root])
    found = slices(frame, out)
    return Page(grid.render(frame, found, [[] for _ in found], out))


def cells_of(page: Page, table: int = 0) -> dict[tuple[str, str], str]:
    """(attack, defense) → text of a heat map, all measures after one another."""
    head, *rows = page.tables[table]
    return {
        (row[0], name): " ".join(text.split()) for row in rows for name, text in zip(head[1:], row[1:], strict=True)
    }


def summary(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return loaded


def rewrite(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    loaded = summary(run)
    change(loaded)
    (run / "summary.json").write_text(json.dumps(loaded))


def stubs(runs: list[Path]) -> None:
    for run in runs:
        (run / "report.html").write_text(f"<!DOCTYPE html><title>{run.name}</title>")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of 2 attacks, 3 defenses, 2 seeds, and a run that failed; to look at and not to touch."""
    root = tmp_path_factory.mktemp("grid")
    names = {"attacks": ("neurotoxin", "pgd"), "defenses": ("fedavg", "krum", "norm_clipping")}
    runs = synthetic.write_grid(root / "runs", **names, rounds=40)
    stubs(runs)
    synthetic.write_run(root / "runs" / "lost", "anticipate", "krum", failed=True, rounds=40)
    return root


@pytest.fixture(scope="module")
def report(made: Path) -> Path:
    return write_grid_report([made / "runs"], made / "report").parent


@pytest.mark.slow
def test_the_page_is_well_formed_alone_and_small(report: Path) -> None:
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "image")
        assert not any(key.startswith("on") or key in ("src", "srcset", "data", "action") for key in attrs)
        for key in {"href", "xlink:href"} & set(attrs):
            inside = attrs[key].startswith("#")
            assert inside or tag == "a"
            assert not inside or attrs[key][1:] in ids, f"{attrs[key]} leads nowhere"
        for target in re.findall(r"url\(([^)]*)\)", " ".join(attrs.values())):
            assert target[1:] in ids, f"url({target}) leads nowhere"
    style = re.search(r"<style>(.*?)</style>", page.text, re.DOTALL)
    assert style is not None
    assert "@import" not in style[1]
    assert "url(" not in style[1]
    assert len(page.text.encode()) < 500_000
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert len(page.scripts) == 1
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert str(report.parent) not in page.text


@pytest.mark.slow
def test_every_file_is_there_and_the_same_every_time(made: Path, report: Path, tmp_path: Path) -> None:
    assert {p.name for p in report.iterdir()} == {
        "report.html",
        "results.parquet",
        "results.csv",
        "tables.md",
        "tables.tex",
        "figures",
    }
    files = {path.name: path.read_bytes() for path in (report / "figures").iterdir()}
    assert set(files) == {f"{stem}.{kind}" for stem in STEMS for kind in ("png", "svg", "pdf")}
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert all(content.startswith(starts[name[-3:]]) for name, content in files.items())
    for name in (name for name in files if name.endswith(".svg")):
        assert ElementTree.fromstring(files[name]).tag.endswith("svg")
    assert len(pd.read_parquet(report / "results.parquet")) == 13
    part = slices(collect([made / "runs"]), report)[0]
    picture, _, _ = grid_pictures.pictures(part)[0]
    grid_panels.save(picture.figure(), tmp_path, picture.name)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == files[path.name]
    svg = picture.inline("survival-0")[0]
    assert svg in (report / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_figures_say_what_they_show(report: Path) -> None:
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    labels = [attrs["aria-label"] for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(labels) == 3 + 2 + 1 + 2 + 1  # survival with all together, curves, price, ROC, scores of the one who has
    assert sum("Attack success rate of pgd by round" in label for label in labels) == 1
    asr = [summary(report.parent / "runs" / f"pgd-krum-seed{seed}")["final"]["asr"] for seed in range(2)]
    assert any(f"krum {words.percent(float(np.median(asr)))}" in label for label in labels)
    assert "Without a score: fedavg, norm_clipping." in page.said
    assert page.text.count("<svg aria-hidden") == len(labels)


def test_numbers_in_the_cells_are_those_of_the_runs(made: Path) -> None:
    page = numbers_of(made)
    cells = cells_of(page)
    assert page.tables[0][0] == ["", "fedavg", "krum", "norm_clipping"]
    assert [row[0] for row in page.tables[0][1:]] == ["anticipate", "neurotoxin", "pgd"]
    runs = [summary(made / "runs" / f"pgd-norm_clipping-seed{seed}") for seed in range(2)]
    plain = [summary(made / "runs" / f"pgd-fedavg-seed{seed}") for seed in range(2)]
    rates = [run["final"]["asr"] for run in runs]
    text = cells["pgd", "norm_clipping"]
    assert text.startswith(words.percent(float(np.median(rates))).replace("\u202f", " "))
    assert f"{100 * min(rates):.1f} – {100 * max(rates):.1f}" in text
    assert len({life["rounds"] for life in (run["lifespan"]["0.5"] for run in runs)}) > 1, "a poor example"
    first = min(run["lifespan"]["0.5"]["rounds"] for run in runs)  # half have ended by then
    assert f" {first} 2 of 2 ended" in text
    costs = [a["final"]["main_accuracy"] - b["final"]["main_accuracy"] for a, b in zip(runs, plain, strict=True)]
    assert words.points(float(np.median(costs))).replace("\u202f", " ") in text
    assert cells["anticipate", "krum"] == "failed"
    assert cells["anticipate", "fedavg"] == "—"
    assert "Main accuracy at the end minus that of fedavg under the same attack" in page.said


def test_censored_lifespans_are_lower_bounds(tmp_path: Path) -> None:
    runs = synthetic.write_grid(tmp_path, attacks=("pgd",), defenses=("fedavg", "krum"), rounds=20)
    stubs(runs)

    def live(rounds: int, censored: bool) -> Callable[[dict[str, Any]], None]:
        life = {"rounds": rounds, "censored": censored, "first_crossing": {"rounds": rounds, "censored": censored}}
        return lambda loaded: loaded["lifespan"].update({"0.5": life})

    for run, (rounds, censored) in zip(runs, [(7, True), (9, True), (4, False), (8, True)], strict=True):
        rewrite(run, live(rounds, censored))
    page = numbers_of(tmp_path)
    assert "<b>&gt;\u202f9</b>" in page.text
    assert "0 of 2 ended" in cells_of(page)["pgd", "fedavg"]
    assert " 4 1 of 2 ended" in cells_of(page)["pgd", "krum"], "at 4 one half is left"
    shades = re.findall(r'class="as-life" style="--shade:([0-9.]+)"', page.text)
    assert [float(shade) for shade in shades] == pytest.approx([1, 4 / 9])


def test_the_headline_is_the_defense_that_leaves_least(made: Path) -> None:
    said = numbers_of(made).said
    means = {}
    for defense in ("fedavg", "krum", "norm_clipping"):
        cells = [
            np.median([summary(made / "runs" / f"{a}-{defense}-seed{s}")["final"]["asr"] for s in range(2)])
            for a in ("neurotoxin", "pgd")
        ]
        means[defense] = float(np.mean(cells))
    assert min(means, key=lambda name: means[name]) == "krum"
    assert "krum leaves the least of the backdoors" in said
    fedavg, krum = (words.percent(means[name]).replace("\u202f", " ") for name in ("fedavg", "krum"))
    assert f"krum {krum} , fedavg (no defense) {fedavg}".replace(" ,", ",") in said
    losses = [
        np.median([pair[0]["final"]["main_accuracy"] - pair[1]["final"]["main_accuracy"] for pair in pairs])
        for pairs in (
            [[summary(made / "runs" / f"{a}-{d}-seed{s}") for d in ("krum", "fedavg")] for s in range(2)]
            for a in ("neurotoxin", "pgd")
        )
    ]
    price = words.points(float(np.mean(losses))).replace("\u202f", " ")
    assert f"Its main accuracy against that of fedavg under the same attack: {price}." in said
    assert "3 attacks × 3 defenses × 2 seeds" in said
    assert "1 of 13 runs failed or has not finished" in said


def test_a_defense_that_has_not_met_every_attack_leads_nothing(tmp_path: Path) -> None:
    some = synthetic.write_grid(
        tmp_path, attacks=("pgd", "neurotoxin"), defenses=("fedavg", "norm_clipping"), rounds=20
    )
    stubs([*some, *synthetic.write_grid(tmp_path, attacks=("pgd",), defenses=("multi_metrics",), rounds=20)])
    said = numbers_of(tmp_path).said
    assert "norm_clipping leaves the least" in said


def test_failed_runs_are_listed_with_what_they_said(made: Path) -> None:
    page = numbers_of(made)
    failed = page.tables[-1]
    assert failed[1][0] == "../runs/lost"
    assert failed[1][1:3] == ["anticipate against krum, seed 0", "failed"]
    assert "every update was rejected" in failed[1][3]
    assert len(failed) == 2


def test_nothing_but_failures_is_said_plainly(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path / "a", "pgd", "krum", failed=True)
    page = numbers_of(tmp_path)
    assert "No run has finished" in page.said
    assert "every update was rejected" in page.said
    assert not page.having("show-asr")


def test_links_lead_to_the_reports_of_the_runs(made: Path) -> None:
    page = numbers_of(made)
    targets = [(made / "report" / unquote(link)).resolve() for link in page.links]
    assert set(targets) == {(run / "report.html").resolve() for run in (made / "runs").glob("*-seed*")}
    assert len(targets) == 24, "in the heat map and in the table"
    assert all(not link.startswith("/") for link in page.links)


def test_links_survive_odd_names_and_a_single_run_is_opened_directly(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / 'a b#c?d%20é"<', "pgd", "krum", rounds=20)
    stubs([run])
    page = numbers_of(tmp_path)
    assert len(page.links) == 2
    for link in page.links:
        assert re.fullmatch(r"[A-Za-z0-9_.~/%-]+", link)
        assert (tmp_path / "report" / unquote(link)).resolve() == (run / "report.html").resolve()
    assert any(tag == "a" and attrs.get("class") == "amounts" for tag, attrs in page.tags)
    assert "–" not in cells_of(page)["pgd", "krum"], "one run has no interval"


def test_a_run_without_a_page_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr("fedsim.report.drawing.save", lambda *_: None)
    monkeypatch.setattr(grid_panels, "save", lambda figure, where, stem: drawn.append(where / stem))
    run = synthetic.write_run(tmp_path / "runs" / "a", "pgd", "fedavg", rounds=12)
    page = Page(write_grid_report([run], tmp_path / "out").read_text(encoding="utf-8"))
    assert "<title>" in (run / "report.html").read_text()
    assert page.links == ["../runs/a/report.html"] * 2
    assert not any("ROC" in attrs.get("aria-label", "") for _, attrs in page.tags), "nobody scored"
    assert set(drawn) == {tmp_path / "out" / "figures" / stem for stem in STEMS - {"roc", "scores"}}
    (run / "report.html").write_text("mine")
    write_grid_report([run], tmp_path / "out")
    assert (run / "report.html").read_text() == "mine"


def test_without_an_undefended_run_the_cost_is_against_the_twin(tmp_path: Path) -> None:
    runs = synthetic.write_grid(tmp_path, attacks=("pgd",), defenses=("krum",), seeds=1, rounds=20)
    stubs(runs)
    rewrite(runs[0], lambda loaded: loaded["stealth"].update({"final": -0.0123}))
    page = numbers_of(tmp_path)
    assert "−1.2\u202fpp" in page.text
    assert "minus that of its clean twin" in page.said


def test_without_twin_and_undefended_run_the_cost_is_not_known(tmp_path: Path) -> None:
    stubs(synthetic.write_grid(tmp_path, attacks=("pgd",), defenses=("krum",), seeds=1, rounds=20, twin=False))
    page = numbers_of(tmp_path)
    assert "neither undefended runs nor clean twins" in page.said
    accuracy = words.percent(summary(tmp_path / "pgd-krum-seed0")["final"]["main_accuracy"])
    assert cells_of(page)["pgd", "krum"].endswith(f"— {accuracy}".replace("\u202f", " "))


def test_cells_that_differ_in_more_than_attack_and_defense_are_slices(tmp_path: Path) -> None:
    runs = []
    for name in ("patch", "blend"):
        runs += synthetic.write_grid(
            tmp_path / name,
            attacks=("pgd",),
            defenses=("fedavg", "krum"),
            seeds=1,
            rounds=20,
            changes={"attack.trigger": {"name": name}},
        )
    stubs(runs)
    found = slices(collect([tmp_path]), tmp_path / "report")
    assert [part.label for part in found] == ["trigger blend", "trigger patch"]
    assert [part.stem for part in found] == ["-1-trigger-blend", "-2-trigger-patch"]
    assert all(len(part.cells) == 2 for part in found)
    page = numbers_of(tmp_path)
    options = [attrs["value"] for tag, attrs in page.tags if tag == "option"]
    assert options == ["0", "1"]
    rate = summary(tmp_path / "patch" / "pgd-krum-seed0")["final"]["asr"]
    assert cells_of(page, 1)["pgd", "krum"].startswith(words.percent(rate).replace("\u202f", " "))
    assert "trigger" in [head.strip() for head in page.tables[-1][0]]


def test_a_trigger_that_goes_with_its_attack_cuts_nothing(tmp_path: Path) -> None:
    runs = [
        synthetic.write_run(
            tmp_path / f"{attack}-{defense}", attack, defense, rounds=20, changes={"attack.trigger": {"name": trigger}}
        )
        for attack, trigger in (("pgd", "patch"), ("neurotoxin", "blend"))
        for defense in ("fedavg", "krum")
    ]
    stubs(runs)
    found = slices(collect([tmp_path]), tmp_path / "report")
    assert [(part.label, len(part.cells)) for part in found] == [("", 4)]


def test_hostile_text_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    changes = {"name": HOSTILE, "task.model": {"name": HOSTILE}}
    for attack in (HOSTILE, "pgd"):
        for defense in (HOSTILE, "fedavg"):
            name = f"{len(attack)}-{len(defense)}"
            stubs([synthetic.write_run(tmp_path / "runs" / name, attack, defense, rounds=12, changes=changes)])
    lost = synthetic.write_run(tmp_path / "runs" / "lost", HOSTILE, "krum", failed=True, changes=changes)
    (lost / "manifest.json").write_text(
        json.dumps({"config_sha256": "0" * 64, "status": "failed", "reason": f"/home/alice/x: {HOSTILE}"})
    )
    page = numbers_of(tmp_path)
    assert len(page.scripts) == 1
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert page.said.count("alert('gotcha')") > 6
    assert "alice" not in page.text
    assert (HOSTILE, HOSTILE) in cells_of(page)
    part = slices(collect([tmp_path]), tmp_path / "report")[0]
    picture, _, _ = next(shown for shown in grid_pictures.pictures(part) if shown[0].name == "asr_curves")
    for svg in picture.inline("x"):
        assert not list(ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}script"))
        assert "<script" not in svg


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "runs" / "a", "pgd", "krum", rounds=12)
    stubs([run])
    part: Slice = slices(collect([tmp_path]), tmp_path)[0]
    (run / "clients.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"clients\.parquet cannot be read"):
        grid_pictures.pictures(part)


# ------------------------------------------------------------------------------------------------- figures


def axes() -> Any:
    return Figure().subplots()


def test_band_is_the_median_with_the_range_over_common_rounds() -> None:
    series = [
        pd.Series(values, index=rounds) for rounds, values in (([1, 3, 5], [0.0, 0.4, 0.8]), ([2, 4], [0.2, 0.8]))
    ]
    band = grid_pictures._band(series)
    assert band is not None
    assert band.rounds.tolist() == [2, 3, 4]
    assert band.middle.tolist() == pytest.approx([0.2, 0.45, 0.7])
    assert band.low.tolist() == pytest.approx([0.2, 0.4, 0.6])
    assert band.high.tolist() == pytest.approx([0.2, 0.5, 0.8])
    many = grid_pictures._band([pd.Series([float(i)], index=[1]) for i in range(9)])
    assert many is not None
    assert (many.low[0], many.middle[0], many.high[0]) == (2, 4, 6), "the middle half"
    assert grid_pictures._band([pd.Series([1.0], index=[1]), pd.Series([1.0], index=[2])]) is None
    assert grid_pictures._band([]) is None


def test_roc_is_that_of_the_scores() -> None:
    perfect = grid_pictures._Scored("s", np.array([0.0, 1.0]), np.array([2.0, np.inf]))
    assert grid_pictures._true_positives(perfect).tolist() == [1.0] * 101
    blind = grid_pictures._true_positives(grid_pictures._Scored("s", np.zeros(4), np.zeros(3)))
    assert blind.tolist() == pytest.approx(np.linspace(0, 1, 101).tolist())
    half = grid_pictures._true_positives(grid_pictures._Scored("s", np.array([0.0, 2.0]), np.array([1.0, 3.0])))
    assert half[[0, 49, 51, 100]].tolist() == [0.5, 0.5, 1, 1]


def test_scores_are_those_of_attacked_rounds(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "a", "pgd", "krum", rounds=12)
    clients = pd.read_parquet(run / "clients.parquet")
    attacked = clients[clients["round"].isin(clients.loc[clients["malicious"], "round"])]
    score = attacked["scores"].map(lambda pairs: dict(pairs)["krum.score"])
    found = grid_pictures._scored({"run": str(run), "auroc_score": "krum.score"})
    assert found is not None
    assert sorted(found.malicious) == sorted(score[attacked["malicious"]])
    assert sorted(found.benign) == sorted(score[~attacked["malicious"]])
    assert grid_pictures._scored({"run": str(run), "auroc_score": "krum.other"}) is None
    assert grid_pictures._scored({"run": str(run), "auroc_score": ""}) is None


def test_survival_is_drawn_as_steps_that_stop_where_knowledge_does() -> None:
    times, alive = np.array([0.0, 5.0, 9.0]), np.array([1.0, 0.5, 0.5])
    alone = np.full(3, np.nan)
    steps = grid_figures.Steps(times, alive, alone, alone, np.array([9.0]))
    dead = grid_figures.Steps(np.array([0.0]), np.array([0.0]), alone[:1], alone[:1], np.zeros(0))
    ax = axes()
    grid_figures.survival(ax, {"a": steps, "b": dead}, grid_panels.lines(["a", "b"]))
    line, tick, flat = ax.lines
    assert np.column_stack(line.get_data()).tolist() == [[0, 1], [0, 1], [5, 0.5], [9, 0.5], [9, 0.5]]
    assert np.column_stack(tick.get_data()).tolist() == [[9, 0.5]]
    assert np.column_stack(flat.get_data()).tolist() == [[0, 1], [0, 0], [9, 0]], "dead for good"


def test_attack_rounds_are_shaded() -> None:
    ax, band = axes(), grid_figures.Band(*(np.array([1.0, 2.0]) for _ in range(4)))
    grid_figures.curves(ax, {"a": band}, grid_panels.lines(["a"]), (3, 7))
    assert (ax.patches[0].get_x(), ax.patches[0].get_width()) == (2.5, 5)


def test_points_have_bars_only_where_there_is_an_interval() -> None:
    ax = axes()
    sure, alone = Interval(0.5, 0.4, 0.6, 3), Interval(0.5, None, None, 1)
    points = [grid_figures.Point("a", "d", sure, alone), grid_figures.Point("b", "d", alone, alone)]
    grid_figures.tradeoff(ax, points, grid_panels.lines(["d"]), grid_panels.markers(["a", "b"]))
    assert [line.get_marker() for line in ax.lines] == ["None", "o", "s"]


def test_neighbours_differ_in_colour_and_dash() -> None:
    drawn = grid_panels.lines([str(i) for i in range(28)], "3")
    looks = [(line.colour, line.dash) for line in drawn.values()]
    assert len(set(looks)) == 28
    assert drawn["3"].colour == grid_panels.NEUTRAL
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in itertools.pairwise(looks[4:]))


def test_a_score_that_never_varies_can_be_drawn() -> None:
    ax = axes()
    grid_figures.spread(ax, {"a": (np.zeros(5), np.zeros(0)), "b": (np.zeros(0), np.zeros(2))})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]


def test_inline_figures_are_rounded_and_follow_the_page() -> None:
    path = f'<path d="M 1.23456 -7.8999" stroke="{grid_panels.COLOURS[0]}"/>'
    svg = f'<svg>{path}\n  <text x="3.14159">v1.2345</text></svg>'
    assert grid_panels.compact(svg) == (
        '<svg><path d="M 1.23 -7.89" stroke="var(--s1)"/> <text x="3.14">v1.2345</text></svg>'
    )


# ------------------------------------------------------------------------------------------------- the command


def test_the_command_reports_one_run_or_many(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [synthetic.write_run(tmp_path / "runs" / name, "pgd", name, rounds=10) for name in ("fedavg", "krum")]
    written: list[Any] = []

    def one(directory: Path) -> Path:
        written.append(directory)
        return directory / "report.html"

    def many(directories: list[Path], out: Path) -> Path:
        written.append((directories, out))
        return out / "report.html"

    monkeypatch.setattr("fedsim.report.write_report", one)
    monkeypatch.setattr("fedsim.report.write_grid_report", many)
    assert cli("report", runs[0]).out.strip() == str(runs[0] / "report.html")
    assert cli("report", tmp_path / "runs").out.strip() == str(tmp_path / "runs" / "report.html")
    assert cli("report", *runs, "--out", tmp_path / "both").out.strip() == str(tmp_path / "both" / "report.html")
    assert written == [runs[0], ([tmp_path / "runs"], tmp_path / "runs"), (runs, tmp_path / "both")]
    unclear = cli("report", *runs)
    assert unclear.status == 2
    assert "--out DIR" in unclear.err
    assert len(written) == 3


def test_the_command_names_what_is_no_run(cli: Callable[..., Any], tmp_path: Path) -> None:
    for name in (".", "nowhere"):
        done = cli("report", tmp_path / name, "--out", tmp_path / "report")
        assert done.status == 2
        assert str(tmp_path / name) in done.err.replace("\n", "")
