"""``fedsim compare``: what differs first, then the numbers, and what stands in the way of comparing them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedsim.experiment import Run, run

Cli = Callable[..., Any]

LIFE = {"rounds": 12, "censored": False, "first_crossing": {"rounds": 9, "censored": False}}
SUMMARY: dict[str, Any] = {
    "t0": 40,
    "lifespan": {"0.25": None, "0.5": LIFE, "0.75": None},
    "half_life": None,
    "area": {},
    "asr_at": {},
    "time_to_inject": {},
    "final": {"main_accuracy": 0.9, "main_loss": 0.3, "perplexity": None, "asr": 0.5},
    "stealth": None,
    "detection": {"auroc": {}, "tpr": 0.0, "fpr": 0.0, "fpr_attack_rounds": 0.0, "malicious_weight": 0.1},
    "floor": "assumed 0",
}
CONFIG: dict[str, Any] = {
    "name": "x",
    "seed": 0,
    "task": {"name": "vision", "data": {"name": "digits"}, "model": {"name": "cnn"}},
    "federation": {"clients": 9, "rounds": 90, "partition": {"name": "iid"}},
    "attack": {"name": "pgd", "trigger": {"name": "patch"}, "schedule": {"name": "continuous"}},
    "defense": [{"name": "krum", "f": 2}],
    "engine": {"name": "serial"},
}


def write(
    directory: Path, summary: dict[str, Any] | None = None, manifest: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """The directory of a run; ``changes`` are sections of its config, ``summary`` ones of its numbers."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(CONFIG | changes, sort_keys=False))
    facts = {"status": "finished", "seconds": 2.0, "config_sha256": "0", "device": "cpu"} | (manifest or {})
    (directory / "manifest.json").write_text(json.dumps(facts))
    (directory / "rounds.parquet").write_bytes(b"")
    (directory / "summary.json").write_text(json.dumps(SUMMARY | (summary or {})))
    return directory


def final(**changes: float) -> dict[str, Any]:
    return {"final": SUMMARY["final"] | changes}


def life(rounds: int, censored: bool = False) -> dict[str, Any]:
    return {"lifespan": {"0.5": {"rounds": rounds, "censored": censored, "first_crossing": None}}}


def line(outcome: Any, name: str) -> list[str]:
    """The cells of the first line of the output that begins with ``name``."""
    found = [text for text in outcome.out.splitlines() if re.match(rf"{re.escape(name)}\s\s", text)]
    return re.split(r"\s{2,}", found[0].strip())[1:] if found else []


def plain(cells: list[str]) -> list[str]:
    return [cell.replace("\u202f", " ") for cell in cells]


# ------------------------------------------------------------------------------------------------- two runs


def test_two_real_runs(finished: Run, tiny: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    other = run(tiny | {"defense": [{"name": "norm_clipping", "bound": 0.25}]}, out=tmp_path / "clipped")
    outcome = cli("compare", finished.directory, other.directory)
    assert outcome.status == 0
    assert outcome.out.index("defense.0.bound") < outcome.out.index("main accuracy")
    assert line(outcome, "defense.0.name") == ["—", "norm_clipping"]
    assert line(outcome, "defense.0.bound") == ["—", "0.25"]
    assert "training.lr" not in outcome.out  # the same in both
    a, b = (float(r.summary["final"]["main_accuracy"]) for r in (finished, other))
    assert plain(line(outcome, "main accuracy"))[:2] == [f"{a:.1%}".replace("%", " %"), f"{b:.1%}".replace("%", " %")]
    assert "Only one side has clean twins" in outcome.text
    assert "seed" not in line(outcome, "config")


def test_numbers_and_differences_of_two_runs(tmp_path: Path, cli: Cli) -> None:
    a = write(tmp_path / "a")
    b = write(tmp_path / "b", final(asr=0.25, main_accuracy=0.92) | life(30))
    outcome = cli("compare", a, b)
    assert "The configs do not differ in anything a result depends on." in outcome.text
    assert plain(line(outcome, "ASR at the end")) == ["50.0 %", "25.0 %", "−25.0 pp"]
    assert plain(line(outcome, "main accuracy")) == ["90.0 %", "92.0 %", "+2.0 pp"]
    assert plain(line(outcome, "lifespan, κ = 50\u202f%")) == ["12", "30", "+18"]
    assert plain(line(outcome, "first fall, κ = 50\u202f%")) == ["9", "—", "—"]
    assert "perplexity" not in outcome.out  # neither has one
    assert "Mind" not in outcome.out


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((12, False), (40, True), ["12", "> 40", "> +28"]),
        ((40, True), (12, False), ["> 40", "12", "< −28"]),
        ((40, True), (90, True), ["> 40", "> 90", "unknown"]),
    ],
)
def test_a_censored_lifespan_gives_a_bound(a: Any, b: Any, expected: list[str], tmp_path: Path, cli: Cli) -> None:
    outcome = cli("compare", write(tmp_path / "a", life(*a)), write(tmp_path / "b", life(*b)))
    assert line(outcome, "lifespan, κ = 50\u202f%") == expected


def test_keys_without_influence_are_only_named(tmp_path: Path, cli: Cli) -> None:
    a = write(tmp_path / "a")
    b = write(
        tmp_path / "b", name="y", engine={"name": "ray", "workers": 2}, federation=CONFIG["federation"] | {"clients": 8}
    )
    outcome = cli("compare", a, b)
    assert line(outcome, "federation.clients") == ["9", "8"]
    assert "without influence on results: name, engine.name, engine.workers" in outcome.text
    assert not line(outcome, "engine.name")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": CONFIG["task"] | {"data": {"name": "mnist5k"}}}, "Different tasks or data"),
        ({"manifest": {"data": {"fingerprint": "b"}}}, "not the same bytes"),
        ({"attack": CONFIG["attack"] | {"trigger": {"name": "blend"}}}, "Different triggers"),
        ({"summary": {"t0": 41}}, "not in the same rounds"),
        ({"federation": CONFIG["federation"] | {"rounds": 91}}, "Different numbers of rounds"),
        ({"seed": 1}, "luck of the seed"),
        ({"manifest": {"versions": {"torch": "9"}}}, "different versions of torch: 1; 9"),
        ({"manifest": {"device": "cuda"}}, "different devices"),
        ({"manifest": {"status": "failed", "reason": "boom"}}, "1 of the runs of B did not finish (failed)"),
        ({"defense": [{"name": "flame"}]}, "AUROC is of different scores: krum.score; z.score"),
    ],
)
def test_what_cannot_be_compared_is_said(changes: dict[str, Any], expected: str, tmp_path: Path, cli: Cli) -> None:
    facts = {"data": {"fingerprint": "a"}, "versions": {"torch": "1"}}
    sides = []
    for name, own in (("a", {}), ("b", changes)):
        detection = SUMMARY["detection"] | {"auroc": {"z.score" if "defense" in own else "krum.score": 0.5}}
        own = {
            **own,
            "manifest": facts | own.get("manifest", {}),
            "summary": {"detection": detection} | own.get("summary", {}),
        }
        sides.append(write(tmp_path / name, **own))
    outcome = cli("compare", *sides)
    assert outcome.status == 0
    assert expected in outcome.text
    assert outcome.out.count("•") == 1


# ------------------------------------------------------------------------------------------------- two sets


def sets(tmp_path: Path, a: list[float], b: list[float], **of_b: Any) -> tuple[Path, Path]:
    """Two directories of runs that differ in the defense, with these ASRs by seed."""
    for side, values, changes in (("a", a, {}), ("b", b, {"defense": []} | of_b)):
        for seed, asr in enumerate(values):
            write(
                tmp_path / side / f"{seed}", final(asr=asr) | life(10 * seed + 5 * (side == "b")), seed=seed, **changes
            )
    return tmp_path / "a", tmp_path / "b"


def test_sets_of_seeds_are_paired(tmp_path: Path, cli: Cli) -> None:
    outcome = cli("compare", *sets(tmp_path, [0.1, 0.4, 0.7], [0.2, 0.5, 0.8]))
    assert "3 runs, 3 seeds" in outcome.text
    assert plain(line(outcome, "ASR at the end")) == ["40.0 [10.0, 70.0] %", "50.0 [20.0, 80.0] %"]
    paired = outcome.out[outcome.out.index("B − A, paired") :]
    found = next(row for row in paired.splitlines() if row.startswith("ASR at the end"))
    assert plain(re.split(r"\s{2,}", found.strip())[1:]) == ["+10.0 [+10.0, +10.0] pp", "3", "+1", "—"]
    assert line(outcome, "defense.0.name") == ["krum", "—"]
    assert "so few seeds" in outcome.text
    assert not line(outcome, "seed")  # the same on both sides


def test_enough_seeds_are_tested(tmp_path: Path, cli: Cli) -> None:
    rng = np.random.default_rng(1)
    a = [round(float(x), 3) for x in rng.uniform(0.1, 0.4, 7)]
    outcome = cli("compare", *sets(tmp_path, a, [x + 0.1 + 0.01 * i for i, x in enumerate(a)]))
    paired = outcome.out[outcome.out.index("B − A, paired") :]
    found = next(row for row in paired.splitlines() if row.startswith("ASR at the end"))
    assert re.split(r"\s{2,}", found.strip())[-3:] == ["7", "+1", f"{2 * 0.5**7:.2g}"]
    assert "so few seeds" not in outcome.text


def test_other_cells_and_other_seeds_are_not_paired(tmp_path: Path, cli: Cli) -> None:
    a, b = sets(tmp_path, [0.1, 0.4], [0.2, 0.5])
    for seed in (7, 8):
        write(b / f"more{seed}", seed=seed, defense=[])
    outcome = cli("compare", a, b)
    assert "2 of the runs of B have no counterpart on the other side" in outcome.text
    assert line(outcome, "seed") == ["0, 1", "0, 1, 7, 8"]
    for seed in (0, 1):
        (a / f"{seed}" / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"seed": 100 + seed}))
    outcome = cli("compare", a, b)
    assert "no run of A has a counterpart in B with the same seed" in outcome.text
    assert "B − A, paired" not in outcome.out
    assert line(outcome, "ASR at the end")


def test_sides_that_cannot_be_paired_say_why(tmp_path: Path, cli: Cli) -> None:
    a, b = sets(tmp_path, [0.1, 0.4], [0.2, 0.5])
    for seed in (0, 1):
        write(a / f"rfa{seed}", seed=seed, defense=[{"name": "rfa"}])
    outcome = cli("compare", a, b)
    assert outcome.status == 0
    assert "A holds runs of the same seed that differ in defense" in outcome.text
    assert "B − A, paired" not in outcome.out


def test_cells_both_sides_share_are_paired_cell_by_cell(tmp_path: Path, cli: Cli) -> None:
    a, b = sets(tmp_path, [0.1, 0.4], [0.2, 0.5])
    other = copy.deepcopy(CONFIG["attack"]) | {"name": "alie"}
    for side, defense, asr in ((a, CONFIG["defense"], 0.0), (b, [], 0.9)):
        for seed in (0, 1):
            write(side / f"alie{seed}", final(asr=asr), seed=seed, attack=other, defense=defense)
    outcome = cli("compare", a, b)
    paired = outcome.out[outcome.out.index("B − A, paired") :]
    found = next(row for row in paired.splitlines() if row.startswith("ASR at the end"))
    assert plain(re.split(r"\s{2,}", found.strip())[1:3]) == ["+50.0 [+10.0, +90.0] pp", "4"]


# ------------------------------------------------------------------------------------------------ bad input


def test_what_is_no_run_is_named(finished: Run, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "bare").mkdir()
    for other, expected in ((tmp_path / "nowhere", "nowhere"), (tmp_path / "bare", "bare holds no run")):
        outcome = cli("compare", finished.directory, other)
        assert outcome.status == 2
        assert expected in outcome.err.replace("\n", "")
    outcome = cli("compare", finished.directory, finished.directory)
    assert outcome.status == 2
    assert "on both sides" in outcome.text


def test_configs_cannot_steer_the_terminal(tmp_path: Path, cli: Cli) -> None:
    a = write(tmp_path / "a", name="[bold]x[/bold]")
    b = write(tmp_path / "b", defense=[{"name": "[red]krum[/red]", "f": "\x1b]0;title\x07"}])
    outcome = cli("compare", a, b)
    assert outcome.status == 0
    assert "[red]krum[/red]" in outcome.out
    assert "\x1b" not in outcome.out
