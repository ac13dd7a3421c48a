"""The page of a run: right numbers, well-formed, alone, and safe to open whatever a config says."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest

from fedsim.errors import InputError
from fedsim.recording.summary import summarise
from fedsim.report import html, words, write_report

HOSTILE = "<script>alert('gotcha')</script>\"><img src=x onerror=alert(1)>"
VOID = {"meta", "link", "input", "br", "hr", "img"}
LOADS = {"src", "href", "xlink:href", "data", "action", "poster", "srcset", "background"}
MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """The page taken apart; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = text
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: dict[str, list[str]] = {}
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self._row: list[str] | None = None
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append((tag, given))
        if "id" in given:
            self.ids.append(given["id"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self._row = []
        elif tag in ("th", "td") and self._row is not None:
            self._row.append("")
        elif tag == "script":
            self.scripts.append((given, ""))
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append((tag, given))
        if "id" in given:
            self.ids.append(given["id"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()
        if tag == "tr" and self._row:
            self.rows.setdefault(self._row[0], self._row[1:])
            self._row = None

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)
            return
        self.words.append(data)
        if self._row and "small" not in self.open:  # definitions stand in <small> beside the name
            self._row[-1] += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(directory: Path) -> Page:
    """The page without its figures, which take most of the time."""
    return Page(html.render(html.read(directory), {}))


def whole_page_of(directory: Path) -> Page:
    path = write_report(directory)
    assert path == directory / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def summary_of(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    return loaded


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    summary = summary_of(directory)
    change(summary)
    (directory / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"twin": False},
        {"attacks": range(0), "last": 20},
        {"attacks": range(10, 11), "last": 40, "every": 5},
        {"attacks": range(5, 21), "last": 20},
        {"last": 1, "attacks": range(1, 2)},
        {"names": ()},
        {"last": 700},
    ],
    ids=["full", "no twin", "no attack", "sparse", "attack to the end", "one round", "no scores", "long"],
)
def test_page_is_well_formed_alone_and_small(make_run: MakeRun, options: dict[str, Any]) -> None:
    directory = make_run(**options)
    page = whole_page_of(directory)
    assert len(page.ids) == len(set(page.ids))
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "image")
        assert not any(key.startswith("on") for key in attrs)
        for key in LOADS & set(attrs):
            assert attrs[key].startswith("#"), f"<{tag} {key}={attrs[key]!r}>"
            assert attrs[key][1:] in page.ids, f"{attrs[key]} leads nowhere"
        for target in re.findall(r"url\(([^)]*)\)", " ".join(attrs.values())):
            assert target[1:] in page.ids, f"url({target}) leads nowhere"
    style = re.search(r"<style>(.*?)</style>", page.text, re.DOTALL)
    assert style is not None
    assert "@import" not in style[1]
    assert "url(" not in style[1]
    assert len(page.text.encode()) < 1_500_000


def test_figures_are_files_too_and_the_same_every_time(make_run: MakeRun) -> None:
    directory = make_run(last=40, attacks=range(5, 10))
    page = write_report(directory).read_bytes()
    files = {path.name: path.read_bytes() for path in (directory / "figures").iterdir()}
    stems = {"backdoor", "acceptance", "scores", "norms", "timings"}
    assert set(files) == {f"{stem}{suffix}" for stem in stems for suffix in (".png", ".svg")}
    for name, content in files.items():
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")
    assert write_report(directory).read_bytes() == page
    assert {path.name: path.read_bytes() for path in (directory / "figures").iterdir()} == files


def test_numbers_are_those_of_the_summary(make_run: MakeRun) -> None:
    directory = make_run(last=120, half=20.0)
    summary, page = summary_of(directory), page_of(directory)
    kappas = ("0.25", "0.5", "0.75")
    lives = [summary["lifespan"][key] for key in kappas]
    assert page.rows["lifespan"] == [words.span(life) for life in lives]
    assert page.rows["first fall"] == [words.span(life["first_crossing"]) for life in lives]
    assert page.rows["submissions to inject"] == [str(summary["time_to_inject"][key]) for key in kappas]
    for horizon, mean in summary["area"].items():
        assert page.rows[horizon] == [words.percent(summary["asr_at"][horizon]), words.percent(mean)]
    assert page.rows["half-life"] == [words.span(summary["half_life"])]
    assert page.rows["final ASR"] == [words.percent(summary["final"]["asr"])]
    assert page.rows["final main accuracy"] == [words.percent(summary["final"]["main_accuracy"])]
    detection = summary["detection"]
    assert page.rows["TPR"] == [words.percent(detection["tpr"])]
    assert page.rows["FPR"] == [words.percent(detection["fpr"])]
    assert page.rows["FPR under attack"] == [words.percent(detection["fpr_attack_rounds"])]
    assert page.rows["malicious weight"] == [words.percent(detection["malicious_weight"])]
    for name, value in detection["auroc"].items():
        assert page.rows[name] == [words.number(value)]
    assert page.rows["over attack rounds"] == [words.points(summary["stealth"]["attack_rounds"])]
    assert page.rows["at t₀"] == [words.points(summary["stealth"]["at_t0"])]
    assert page.rows["at the end"] == [words.points(summary["stealth"]["final"])]
    assert page.headings[1] == f"The backdoor lived {summary['lifespan']['0.5']['rounds']} rounds"


def test_numbers_are_read_and_not_computed_again(make_run: MakeRun) -> None:
    directory = make_run(last=100)

    def change(summary: dict[str, Any]) -> None:
        summary["lifespan"]["0.5"] = {
            "rounds": 777,
            "censored": False,
            "first_crossing": {"rounds": 555, "censored": False},
        }
        summary["half_life"] = {"rounds": 321, "censored": True}
        summary["detection"]["tpr"] = 0.123

    rewrite(directory, change)
    page = page_of(directory)
    assert page.headings[1] == "The backdoor lived 777 rounds"
    assert page.rows["lifespan"][1] == "777"
    assert page.rows["first fall"][1] == "555"
    assert page.rows["half-life"] == [">\u202f321"]
    assert page.rows["TPR"] == ["12.3\u202f%"]


def test_main_figure_can_be_read_off_round_by_round(make_run: MakeRun) -> None:
    directory = make_run(last=60, every=4, attacks=range(10, 21))
    page = whole_page_of(directory)
    data = json.loads(next(text for attrs, text in page.scripts if attrs.get("id") == "points"))
    rounds = pd.read_parquet(directory / "rounds.parquet").dropna(subset=["asr"])
    twin = pd.read_parquet(directory / "twin" / "rounds.parquet").dropna(subset=["asr"])
    assert data["t0"] == 20
    assert data["round"] == rounds["round"].tolist()
    assert data["asr"] == rounds["asr"].round(4).tolist()
    assert data["main_accuracy"] == rounds["main_accuracy"].round(4).tolist()
    assert data["twin"] == twin["asr"].round(4).tolist()
    frames = [json.loads(attrs["data-frame"]) for _, attrs in page.tags if "data-frame" in attrs]
    assert len(frames) == 2
    for frame in frames:
        assert (frame["from"], frame["to"]) == (0.5, 60.5)
        assert 0 < frame["left"] < frame["left"] + frame["width"] < 100
        assert 0 < frame["top"] < frame["top"] + frame["height"] < 100


def test_only_our_own_script_may_run(make_run: MakeRun) -> None:
    page = page_of(make_run(last=30, attacks=range(5, 10)))
    policy = next(attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    code = [text for attrs, text in page.scripts if attrs.get("type") != "application/json"]
    assert len(code) == 1
    digest = base64.b64encode(hashlib.sha256(code[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_hostile_text_is_shown_and_not_obeyed(make_run: MakeRun) -> None:
    directory = make_run(
        last=40,
        attacks=range(10, 15),
        names=(HOSTILE, "a $price$ _{x}^"),
        config={
            "name": HOSTILE,
            "attack": {"name": HOSTILE, "trigger": HOSTILE},
            "defense": [{"name": HOSTILE}],
            "seed": HOSTILE,
        },
        manifest={HOSTILE: HOSTILE, "versions": {HOSTILE: [HOSTILE]}},
    )
    page = whole_page_of(directory)
    assert len(page.scripts) == 2
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert page.headings[0] == HOSTILE
    assert page.rows[HOSTILE] == [words.number(summary_of(directory)["detection"]["auroc"][HOSTILE])]
    assert page.said.count("alert('gotcha')") > 8
    assert "a $price$ _{x}^" in page.said
    figure = ElementTree.fromstring((directory / "figures" / "scores.svg").read_bytes())
    assert any("a $price$ _{x}^" in (element.text or "") for element in figure.iter())
    assert not list(figure.iter("{http://www.w3.org/2000/svg}script"))


def test_next_word_has_its_own_words_and_perplexity(make_run: MakeRun) -> None:
    directory = make_run(
        task="next_word",
        last=40,
        attacks=range(10, 15),
        manifest={"data": {"class_names": [], "commonest_word": "<eos>", "commonest_word_accuracy": 0.0803}},
    )
    page, final = page_of(directory), summary_of(directory)["final"]
    perplexity = words.perplexity(final["perplexity"])
    assert page.rows["final perplexity"] == [perplexity]
    assert f"perplexity {perplexity} round 40" in page.said
    accuracy, asr = (words.percent(final[key]).replace("\u202f", " ") for key in ("main_accuracy", "asr"))
    assert f"main accuracy {accuracy} top-1 next word;" in page.said
    assert f"completes with a target word; at the last evaluated round {asr}" in page.said
    assert "mean loss per held-out word" in page.said
    assert "always saying “<eos>” would get a main accuracy of 8.0 %." in page.said
    assert "<eos>" not in page.text, "it is no tag"
    assert "classes" not in page.ids
    assert "share of test prompts and words" in whole_page_of(directory).said


def test_classes_have_their_accuracies_at_the_end(make_run: MakeRun) -> None:
    names = ["cat", HOSTILE, "<eos>", "dog"]
    directory = make_run(
        task="sentiment",
        last=40,
        every=7,
        attacks=range(10, 15),
        classes=4,
        manifest={"data": {"class_names": names, "commonest_class": HOSTILE, "commonest_class_accuracy": 0.5}},
        config={"attack": {"name": "pgd", "trigger": {"name": "phrase", "target": 2}}},
    )
    page = whole_page_of(directory)
    assert page.rows["cat"] == ["50.0\u202f%"]
    assert page.rows[HOSTILE] == ["—"], "no test examples"
    assert page.rows["<eos>"] == ["52.0\u202f%"]
    assert page.rows["dog"] == ["53.0\u202f%"]
    assert "<eos> target of the backdoor 52.0 %" in page.said
    assert page.said.count("target of the backdoor") == 1
    assert ("a", {"href": "#classes"}) in page.tags
    assert f"always saying “{HOSTILE}” would get" in page.said
    assert len(page.scripts) == 2
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "perplexity" not in page.said


@pytest.mark.parametrize(("classes", "shown"), [(1, True), (20, True), (21, False)])
def test_classes_without_names_are_numbers_and_too_many_are_left_out(
    make_run: MakeRun, classes: int, shown: bool
) -> None:
    page = page_of(make_run(last=5, attacks=range(2, 3), classes=classes))
    assert ("classes" in page.ids) is shown
    assert (("a", {"href": "#classes"}) in page.tags) is shown
    if shown:
        assert page.rows["0"] == ["50.0\u202f%"]
        assert page.rows.get("19") == (["69.0\u202f%"] if classes == 20 else None)
    assert "target of the backdoor" not in page.said, "the config names none"


@pytest.mark.parametrize(
    "trigger", ["phrase", {"name": "edge_case", "target": None}, {"target": "1"}, {"target": 99}, None]
)
def test_a_target_that_is_not_known_is_not_marked(make_run: MakeRun, trigger: Any) -> None:
    page = page_of(make_run(last=5, attacks=range(2, 3), config={"attack": {"name": "pgd", "trigger": trigger}}))
    assert "classes" in page.ids
    assert "target of the backdoor" not in page.said


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_an_older_version_opens(make_run: MakeRun, finished: bool) -> None:
    directory = make_run(last=30, attacks=range(5, 10), task=None, summary=finished)
    assert "perplexity" not in pd.read_parquet(directory / "rounds.parquet")
    if finished:
        rewrite(directory, lambda summary: [summary["final"].pop(key) for key in ("perplexity", "class_accuracy")])
    page = whole_page_of(directory)
    assert "classes" not in page.ids
    assert "perplexity" not in page.said
    assert "always saying" not in page.said
    assert len(page.rows["final main accuracy"]) == 1


def test_names_no_machine_and_no_user(make_run: MakeRun, tmp_path: Path) -> None:
    directory = make_run(
        last=30,
        attacks=range(5, 10),
        config={
            "task": {"name": "vision", "data": {"name": "files", "path": "/home/alice/data/mnist"}},
            "plugins": ["C:\\Users\\alice\\mine.py", "/home/dr alice/my own.py"],
        },
        manifest={"data": {"path": "/home/alice/data/mnist"}, "hub": "ylecun/mnist", "share": "1/2"},
    )
    page = whole_page_of(directory)
    assert "alice" not in page.text
    assert str(tmp_path) not in page.text
    assert "…/mnist" in page.said
    assert "…/mine.py" in page.said
    assert "…/my own.py" in page.said
    assert "ylecun/mnist" in page.said
    for path in (directory / "figures").glob("*.svg"):
        assert str(tmp_path) not in path.read_text()


def test_twin_is_the_floor_in_the_figure(make_run: MakeRun) -> None:
    both = make_run("with", last=30, attacks=range(5, 10))
    alone = make_run("without", last=30, attacks=range(5, 10), twin=False)
    assert "clean twin’s ASR" in whole_page_of(both).said
    page = whole_page_of(alone)
    assert "clean twin’s ASR" not in page.said
    assert "assumed 0" in page.said
    assert "over attack rounds" not in page.rows


def test_a_run_that_has_not_finished_says_so(make_run: MakeRun) -> None:
    directory = make_run(last=90, summary=False)
    page = page_of(directory)
    assert "This run has not finished. The numbers are those of its first 90 rounds." in page.said
    expected = summarise(
        pd.read_parquet(directory / "rounds.parquet"),
        pd.read_parquet(directory / "clients.parquet"),
        twin=pd.read_parquet(directory / "twin" / "rounds.parquet"),
    )
    assert page.rows["half-life"] == [words.span(expected["half_life"])]
    assert "has not finished" not in page_of(make_run("other", last=90)).said


def test_what_is_missing_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not the directory of a run: it has no rounds\.parquet"):
        write_report(tmp_path)
    directory = make_run(last=5, attacks=range(2, 3))
    rounds = directory / "rounds.parquet"
    whole = pd.read_parquet(rounds)
    whole.iloc[:0].to_parquet(rounds)
    with pytest.raises(InputError, match="no round has ended yet"):
        write_report(directory)
    rounds.write_bytes(b"PAR1 cut off")
    with pytest.raises(InputError, match=r"rounds\.parquet cannot be read"):
        write_report(directory)
    whole.to_parquet(rounds)
    (directory / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json is not valid JSON"):
        write_report(directory)
    (directory / "summary.json").unlink()
    (directory / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"config\.yaml is not valid YAML"):
        write_report(directory)


def test_what_ran_is_listed_and_long_tables_are_cut(make_run: MakeRun) -> None:
    by_round = {str(t): [t % 7] for t in range(20, 120)}
    manifest = {
        "seed": 5,
        "adversary": {"rounds": 100, "malicious_clients_by_round": by_round},
        "methods": {"attack": {"name": "neurotoxin", "knows": ["own data", "the last aggregated update"]}},
    }
    said = page_of(make_run(last=20, attacks=range(5, 8), manifest=manifest)).said
    assert "methods.attack" not in said
    assert "attack.knows own data, the last aggregated update" in said
    assert "malicious_clients_by_round 20: 6, 21: 0," in said
    assert "(100 in all)" in said
    assert "119: 0" not in said


def test_timings_add_up(make_run: MakeRun) -> None:
    directory = make_run(last=50)
    timings = pd.read_parquet(directory / "timings.parquet")
    page = page_of(directory)
    share = timings["seconds_train"].sum() / timings["seconds_total"].sum()
    assert page.rows["train"][2] == words.percent(share)
    assert page.rows["total"][0] == words.seconds(timings["seconds_total"].sum())
    (directory / "timings.parquet").unlink()
    assert "No timings were recorded." in page_of(directory).said
