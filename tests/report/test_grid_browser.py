"""The page of many runs in a real browser: Chromium without a window, driven by playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsim.recording.results import collect
from fedsim.report import grid_panels, write_grid_report
from fedsim.report.statistics import summary_by_row
from tests.support.places import script

pytestmark = pytest.mark.slow

HOSTILE = "<script>document.title = 'gotcha'</script>"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; where it is missing the tests are skipped, unless FEDSIM_BROWSER=required (as .ci/run sets it)."""
    missing = pytest.fail if os.environ.get("FEDSIM_BROWSER") == "required" else pytest.skip
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        missing("there is no chromium on the PATH; install it (Debian: apt install chromium) to test the page")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed; run: pip install -e '.[test]'")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two triggers × two attacks × two defenses × two seeds, one cell of a single run, and a hostile failure."""
    synthetic = script("benchmarks/report_page.py")
    root = tmp_path_factory.mktemp("browser")
    attacks, defenses = ("neurotoxin", "pgd"), ("fedavg", "krum")
    for trigger in ("blend", "patch"):
        changes = {"attack.trigger": {"name": trigger}}
        grid = {"attacks": attacks, "defenses": defenses, "rounds": 24, "changes": changes}
        synthetic.write_grid(root / "runs" / trigger, seeds=2 if trigger == "blend" else 1, **grid)
    for run in (root / "runs").glob("*/*"):
        (run / "report.html").write_text(f"<!DOCTYPE html><title>{run.parent.name}/{run.name}</title>")
    changes = {"attack.trigger": {"name": "patch"}, "task.model": {"name": HOSTILE}}
    synthetic.write_run(root / "runs" / "patch" / "lost", HOSTILE, "krum", failed=True, changes=changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid_panels, "save", lambda *_: None)  # the files are tested elsewhere, and take their time
        return write_grid_report([root / "runs"], root / "report")


@pytest.fixture
def visit(browser: Any, page_file: Path) -> Iterator[Callable[..., Any]]:
    """Open the page in a fresh context; afterwards nothing may have been complained about, nor asked of a network."""
    contexts, complaints = [], []

    def open_page(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        page.goto(page_file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def heat(page: Any) -> list[str]:
    """What the cells of the visible heat map show."""
    texts: list[str] = page.locator(".heat:visible .amounts b:visible").all_inner_texts()
    return texts


def column(page: Any, name: str) -> list[str]:
    """The visible cells of a column of the table of all rows, without their notes."""
    heads = [text.split("\n")[0].strip() for text in page.locator("#all-rows thead th").all_inner_texts()]
    at = heads.index(name) + 1
    cells = page.locator(f"#all-rows tbody tr:visible > :nth-child({at})").all_inner_texts()
    return [cell.split("\n")[0].strip() for cell in cells]


def focused(page: Any) -> str:
    told: str = page.evaluate("document.activeElement.id || document.activeElement.className")
    return told


def test_the_page_opens_with_its_figures_and_its_names_are_only_names(visit: Callable[..., Any]) -> None:
    page = visit()
    assert page.title() == "synthetic: krum leaves the least of the backdoors"
    shown = page.locator(".plot svg:visible")
    assert shown.count() == 3 + 2 + 1 + 2 + 1
    assert all(shown.nth(i).bounding_box()["height"] > 100 for i in range(shown.count()))
    assert page.locator("#failed td", has_text=HOSTILE).count() == 1


def test_the_switch_changes_what_the_cells_show(visit: Callable[..., Any]) -> None:
    page = visit()
    rates = heat(page)
    assert len(rates) == 4
    assert all(text.endswith("%") for text in rates)
    page.get_by_role("radio", name="lifespan (κ = 50 %)").check()
    lives = heat(page)
    assert len(lives) == 4
    assert all(text.removeprefix(">").strip().isdigit() for text in lives)
    page.get_by_role("radio", name="main-metric cost").check()
    assert all(text.endswith("pp") for text in heat(page))
    assert len(heat(page)) == 4
    page.get_by_role("radio", name="ASR at the end").check()
    assert heat(page) == rates


def test_the_colour_of_a_cell_follows_its_number(visit: Callable[..., Any]) -> None:
    page = visit()
    cells = page.locator(".heat:visible .amounts > span:visible")
    shades = cells.evaluate_all(
        "cells => cells.map(cell => getComputedStyle(cell).backgroundColor.match(/[0-9.]+/g).slice(0, 3)"
        ".reduce((sum, part) => sum + Number(part), 0))"
    )
    rates = [float(text.removesuffix("%").strip()) for text in heat(page)]
    order = sorted(range(len(rates)), key=lambda i: rates[i])
    assert [shades[i] for i in order] == sorted(shades, reverse=True), "worse is darker"
    assert shades[order[0]] > shades[order[-1]]


def test_the_slice_changes_heat_map_and_figures(visit: Callable[..., Any]) -> None:
    page = visit()
    blend = heat(page)
    page.get_by_label("Slice").select_option(label="trigger patch")
    assert page.locator(".slice:visible h3", has_text="trigger patch").count() >= 2
    assert page.locator(".slice:visible h3", has_text="trigger blend").count() == 0
    assert heat(page) != blend
    assert page.locator(".plot svg:visible").count() == 9


def test_a_cell_opens_the_reports_of_its_runs(visit: Callable[..., Any]) -> None:
    page = visit()
    page.locator(".heat:visible summary").first.click()
    page.locator(".heat:visible details[open] a").first.click()
    page.wait_for_url("**/runs/blend/neurotoxin-fedavg-seed0/report.html")
    assert page.title() == "blend/neurotoxin-fedavg-seed0"
    page.go_back()
    page.get_by_label("Slice").select_option(label="trigger patch")
    page.locator(".heat:visible a.amounts").nth(1).click()
    page.wait_for_url("**/runs/patch/neurotoxin-krum-seed0/report.html")
    assert page.title() == "patch/neurotoxin-krum-seed0"


def test_the_table_sorts_up_and_down(visit: Callable[..., Any], page_file: Path) -> None:
    page = visit()
    summary = summary_by_row(collect([page_file.parent.parent / "runs"]))
    rates = [f"{100 * rate:.1f}" for rate in sorted(summary["asr"].dropna())]
    assert len(rates) == 8
    head = page.locator("#all-rows th", has=page.get_by_role("button", name="ASR", exact=True))
    assert head.get_attribute("aria-sort") == "none"
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert [cell.split("\u202f")[0] for cell in column(page, "ASR")] == rates
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert [cell.split("\u202f")[0] for cell in column(page, "ASR")] == rates[::-1]
    page.get_by_role("button", name="defense").click()
    assert column(page, "defense") == ["fedavg"] * 4 + ["krum"] * 4
    assert head.get_attribute("aria-sort") == "none"
    assert page.locator("#all-rows [aria-sort=ascending]").count() == 1
    page.get_by_role("button", name="AUROC").click()
    assert column(page, "AUROC")[4:] == ["—"] * 4
    page.get_by_role("button", name="AUROC").click()
    assert column(page, "AUROC")[4:] == ["—"] * 4, "what is not known comes last either way"


def test_the_table_filters(visit: Callable[..., Any]) -> None:
    page = visit()
    page.get_by_label("Filter").fill("PGD  krum")
    assert column(page, "attack") == ["pgd"] * 2
    assert column(page, "defense") == ["krum"] * 2
    assert page.locator("#shown").inner_text() == "2 of 8 rows"
    page.get_by_role("button", name="trigger").click()
    assert column(page, "trigger") == ["blend", "patch"], "what is hidden stays so"
    page.get_by_label("Filter").fill("nothing like it")
    assert column(page, "attack") == []
    page.get_by_label("Filter").fill("")
    assert len(column(page, "attack")) == 8


def test_everything_works_from_the_keyboard(visit: Callable[..., Any]) -> None:
    page = visit()
    page.keyboard.press("Tab")
    assert focused(page) == "skip"
    assert page.locator(".skip").bounding_box()["x"] > 0, "it comes into view"
    page.keyboard.press("Enter")
    page.locator("#show-asr").focus()
    page.keyboard.press("ArrowRight")
    assert focused(page) == "show-life"
    assert all(text.removeprefix(">").strip().isdigit() for text in heat(page))
    page.keyboard.press("Tab")
    assert focused(page) == "slice"
    page.keyboard.press("Tab")
    assert focused(page) == "scroll"
    page.keyboard.press("Tab")
    assert focused(page) == "amounts"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "focus is seen"
    page.keyboard.press("Enter")
    assert page.locator(".heat details[open]").count() == 1
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    assert page.locator(".heat details[open]").count() == 0
    assert focused(page) == "amounts"
    page.get_by_role("button", name="ASR", exact=True).focus()
    page.keyboard.press("Enter")
    assert page.locator("#all-rows [aria-sort=ascending]").inner_text().startswith("ASR")
    page.locator(".heat:visible summary").first.focus()
    for key in ("Enter", "Tab", "Enter"):
        page.keyboard.press(key)
    page.wait_for_url("**/runs/blend/neurotoxin-fedavg-seed0/report.html")


def test_dark_follows_the_system_in_page_and_figures(visit: Callable[..., Any]) -> None:
    looks = []
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        looks.append(
            page.evaluate(
                """() => {
                  const line = [...document.querySelectorAll(".asr_curves svg path")]
                    .map(path => getComputedStyle(path).stroke).filter(stroke => stroke.startsWith("rgb"));
                  const cell = document.querySelector(".heat .amounts > span");
                  return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
                    getComputedStyle(cell).backgroundColor, line.join()];
                }"""
            )
        )
    (paper, ink, cell, lines), (dark_paper, dark_ink, dark_cell, dark_lines) = looks
    assert (paper, dark_paper) == ("rgb(255, 255, 254)", "rgb(20, 24, 29)")
    assert ink != dark_ink
    assert cell != dark_cell
    assert lines
    assert lines != dark_lines


def contrast(page: Any, selector: str) -> list[float]:
    """The WCAG contrast of the text of elements to their own background."""
    found: list[float] = page.locator(selector).evaluate_all(
        """elements => elements.map(element => {
          const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const light = colour => {
            canvas.fillStyle = "#000";
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(part => part / 255)
              .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
          };
          const both = [light(getComputedStyle(element).color),
            light(getComputedStyle(element.closest("span")).backgroundColor)].sort((a, b) => b - a);
          return (both[0] + 0.05) / (both[1] + 0.05);
        })"""
    )
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_can_be_read_on_every_colour(visit: Callable[..., Any], scheme: str) -> None:
    page = visit(color_scheme=scheme)
    for shade in (0, 0.25, 0.5, 0.75, 1):
        page.locator(".heat .amounts > span").evaluate_all(
            "(cells, shade) => cells.forEach(cell => cell.style.setProperty('--shade', shade))", shade
        )
        for part in ("b", "small"):
            assert min(contrast(page, f".heat:visible .amounts {part}:visible")) >= 4.5


def test_a_narrow_window_does_not_scroll_sideways(visit: Callable[..., Any]) -> None:
    page = visit(viewport=NARROW)
    assert page.evaluate("innerWidth") == 360
    for choice in ("show-asr", "show-life", "show-cost"):
        page.locator(f"#{choice}").check(force=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator(".heat:visible summary").first.click()
    page.locator("#definitions summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_it_is_readable_without_scripts(visit: Callable[..., Any]) -> None:
    page = visit(java_script_enabled=False)
    assert page.locator(".plot svg:visible").count() == 18, "both slices"
    assert page.locator(".heat:visible").count() == 2
    assert page.locator("#all-rows tbody tr:visible").count() == 8
    assert not page.locator("#filter").is_visible()
    assert not page.locator("#slice").is_visible()
    page.get_by_role("radio", name="main-metric cost").check()
    assert all(text.endswith("pp") for text in heat(page)), "the switch needs none"


def test_on_paper_everything_is_there(visit: Callable[..., Any]) -> None:
    page = visit()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".heat:visible").count() == 2
    assert page.locator("#definitions dd:visible").count() > 10
    assert not page.locator("#filter").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator(".heat:visible").count() == 1
