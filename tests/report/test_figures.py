"""What the figures show, asked of matplotlib itself."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from fedsim.errors import InputError
from fedsim.recording.summary import summarise
from fedsim.report import drawing, figures, grid_panels


def table(asr: list[float], attacks: set[int], start: int = 1) -> pd.DataFrame:
    rounds = list(range(start, start + len(asr)))
    return pd.DataFrame(
        {
            "round": rounds,
            "main_accuracy": [0.9] * len(asr),
            "main_loss": [0.3] * len(asr),
            "asr": asr,
            "malicious_submitted": [int(t in attacks) for t in rounds],
        }
    )


NO_CLIENTS = pd.DataFrame({"round": [], "malicious": [], "accepted": [], "weight": [], "status": [], "scores": []})


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_backdoor_figure_marks_the_attack_and_its_age() -> None:
    rounds = table([0.1, 0.9, 0.9, 0.8, 0.7, 0.6, 0.3, 0.2, 0.1, 0.1], {2, 3})
    figure = figures.backdoor(rounds, summarise(rounds, NO_CLIENTS))
    figure.draw_without_rendering()
    ax = figure.axes[0]
    top = ax.child_axes[0]
    assert "s = t − 3" in top.get_xlabel()
    assert [int(tick) for tick in top.get_xticks()] == list(range(8))  # ages 0 to 7
    assert ax.transData.transform((3, 0))[0] == pytest.approx(top.transData.transform((0, 0))[0])
    assert "2 attack rounds" in texts(ax)
    assert "above 50\u202f% for 3 rounds" in texts(ax)
    curves = {line.get_color(): line for line in ax.lines if len(np.asarray(line.get_xdata())) == 10}
    assert np.asarray(curves[drawing.ATTACK].get_ydata()).tolist() == rounds["asr"].tolist()


def test_backdoor_figure_says_what_the_rates_are_shares_of() -> None:
    rounds = table([0.1, 0.9, 0.9, 0.1], {2})
    summary = summarise(rounds, NO_CLIENTS)
    usual = figures.backdoor(rounds, summary).axes[0]
    assert usual.get_ylabel() == "share of test examples"
    assert "above 50\u202f% for 1 round" in texts(usual)
    assert figures.backdoor(rounds, summary, of="test words").axes[0].get_ylabel() == "share of test words"


def test_backdoor_figure_without_attack_has_no_age() -> None:
    rounds = table([0.1] * 5, set())
    ax = figures.backdoor(rounds, summarise(rounds, NO_CLIENTS)).axes[0]
    assert not ax.child_axes
    assert not any("attack" in text for text in texts(ax))


def test_compare_draws_medians_and_bands_by_age() -> None:
    figure = figures.compare(
        {
            "one": [
                table([0.9, 0.8, 0.6, 0.4], {1}),
                table([0.0, 0.7, 0.6, 0.5, 0.3], {2}),
                table([0.8, 0.2, 0.1], {1}),
            ],
            "two": [table([0.9, np.nan, 0.5], {1})],
        }
    )
    ax = figure.axes[0]
    first, second = (line for line in ax.lines if line.get_linewidth() > 1)
    assert np.asarray(first.get_xdata()).tolist() == [0, 1, 2]
    assert np.asarray(first.get_ydata()).tolist() == [0.8, 0.6, 0.5]  # of .9 .7 .8, .8 .6 .2, .6 .5 .1
    band = ax.collections[0].get_paths()[0].vertices
    assert {tuple(np.round(point, 3)) for point in np.asarray(band)} >= {(1.0, 0.2), (1.0, 0.8), (2.0, 0.1), (2.0, 0.6)}
    assert np.asarray(second.get_xdata()).tolist() == [0, 2]
    assert {"one", "two"} <= set(texts(ax))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "no runs of 'mine'"),
        ([table([0.1, 0.2], set())], "no malicious submission"),
        ([table([0.1, np.nan], {2})], "no evaluated round since"),
        ([table([0.9, np.nan, 0.1], {2}), table([0.9, np.nan], {1})], "no age of the backdoor in common"),
    ],
)
def test_compare_refuses_what_cannot_be_compared(runs: list[pd.DataFrame], message: str) -> None:
    with pytest.raises(InputError, match=message):
        figures.compare({"mine": runs})


def test_names_at_the_ends_do_not_touch() -> None:
    runs = {name: [table([0.9, value], {1})] for name, value in (("a", 0.5), ("b", 0.501), ("c", 0.502), ("d", 1.0))}
    figure = figures.compare(runs, kappa=None)
    figure.draw_without_rendering()
    ax = figure.axes[0]
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: float(box.y0))
    assert len(boxes) == 4
    for below, above in pairwise(boxes):
        assert above.y0 >= below.y1 - 3  # the boxes have room for letters that hang down
    assert boxes[-1].y1 < figure.bbox.y1


def test_long_curves_are_averaged_over_equal_stretches() -> None:
    series = pd.Series(np.arange(1000.0), index=range(1, 1001))
    x, y = drawing.stretches(series)
    assert len(x) <= 150
    assert x[0] == np.arange(1, 8).mean()  # 7 rounds a stretch
    assert y[0] == np.arange(0, 7).mean()
    assert y[-1] == np.arange(994, 1000).mean()
    short_x, short_y = drawing.stretches(series.iloc[:100])
    assert short_x.tolist() == list(range(1, 101))
    assert short_y.tolist() == series.iloc[:100].tolist()


def test_figures_follow_the_page_into_the_dark() -> None:
    rounds = table([0.1, 0.9, 0.8, 0.3], {2})
    svg = drawing.inline(figures.backdoor(rounds, summarise(rounds, NO_CLIENTS)), "mine")
    for variable in ("--ink", "--muted", "--rule", "--attack", "--honest", "--sans"):
        assert f"var({variable})" in svg, variable
    assert not any(colour in svg for colour in drawing.VARIABLES)
    assert "#000000" not in svg
    assert "DejaVu" not in svg


def test_names_in_a_figure_stay_as_they_are() -> None:
    """What makes a figure part of a page changes its tags, and no name, whatever it looks like."""
    odd = 'x id="mine" url(#y) DejaVu Sans, #c25400 #0070b0 d="0.12345" < " id="'
    svg = drawing.inline(figures.compare({odd: [table([0.9, 0.5], {1})]}), "mine")
    for text in (svg, grid_panels.compact(svg)):
        assert odd in [element.text for element in ElementTree.fromstring(text).iter()]


def test_matplotlib_is_left_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    drawing.save(figures.compare({"a": [table([0.9, 0.5], {1})]}), tmp_path, "figure")
    assert dict(matplotlib.rcParams) == before
    assert {path.name for path in tmp_path.iterdir()} == {"figure.png", "figure.svg"}
