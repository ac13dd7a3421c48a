"""Many runs as one table: which directories are runs, what they are called, which numbers they have."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from fedsim.errors import InputError
from fedsim.experiment import Run, run
from fedsim.recording.labels import LABELS
from fedsim.recording.results import MEASURES, SPANS, collect, write_results
from fedsim.recording.runs import run_directories

Make = Callable[..., Path]

CONFIG: dict[str, Any] = {
    "name": "synthetic",
    "seed": 0,
    "task": {
        "name": "vision",
        "data": {"name": "mnist5k", "test_fraction": 0.2},
        "model": {"name": "cnn", "hidden": 8},
    },
    "federation": {"clients": 40, "rounds": 50, "partition": {"name": "dirichlet", "alpha": 1.0}},
    "training": {"lr": 0.1, "momentum": 0.9},
    "attack": {
        "name": "pgd",
        "epsilon": 2.0,
        "trigger": {"name": "pixel_pattern", "target": 8},
        "schedule": {"name": "continuous", "start": 3, "stop": 9},
        "craft": [],
        "lr": None,
    },
    "defense": [{"name": "norm_clipping", "bound": 3.0}],
    "evaluation": {"every": 1, "twin": False},
    "engine": {"name": "serial", "workers": "auto"},
    "output": {"dir": "runs"},
}
LIFE = {"rounds": 12, "censored": False, "first_crossing": {"rounds": 9, "censored": False}}
SUMMARY: dict[str, Any] = {
    "t0": 9,
    "lifespan": {"0.25": {**LIFE, "rounds": 41, "censored": True}, "0.5": LIFE, "0.75": None},
    "half_life": {"rounds": 7, "censored": True},
    "area": {"10": 0.5, "50": None},
    "asr_at": {"10": 0.4, "50": None},
    "time_to_inject": {"0.25": 2, "0.5": 3, "0.75": None},
    "final": {"round": 50, "main_accuracy": 0.9, "main_loss": 0.3, "perplexity": None, "asr": 0.2},
    "stealth": None,
    "detection": {
        "auroc": {"a.first": 0.1, "norm_clipping.norm": 0.8},
        "tpr": 0.25,
        "fpr": 0.125,
        "fpr_attack_rounds": 0.5,
        "malicious_weight": None,
    },
    "floor": "assumed 0",
}


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with dotted keys replaced."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        place = result
        *path, last = key.split(".")
        for part in path:
            place = place[part]
        place[last] = value
    return result


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that writes the directory of a run: ``make("a", seed=1, **{"training.lr": 0.2})``."""

    def write(
        name: str,
        /,
        *,
        summary: dict[str, Any] | None = SUMMARY,
        status: str = "finished",
        reason: str = "",
        labels: dict[str, str] | None = None,
        **changes: Any,
    ) -> Path:
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(yaml.safe_dump(changed(CONFIG, changes), sort_keys=False))
        manifest = {"status": status, "reason": reason, "seconds": 4.5, "config_sha256": "0"}
        (directory / "manifest.json").write_text(json.dumps(manifest))
        pd.DataFrame({"round": [1]}).to_parquet(directory / "rounds.parquet")
        if summary is not None:
            (directory / "summary.json").write_text(json.dumps(summary))
        if labels is not None:
            (directory / "cell.json").write_text(json.dumps({"labels": labels, "seed": 0}))
        return directory

    return write


def one(directory: Path) -> pd.Series[Any]:
    frame = collect([directory])
    assert len(frame) == 1
    return frame.iloc[0]


def labels_of(frame: pd.DataFrame, column: str) -> list[str]:
    return sorted(frame[column].unique())


# ------------------------------------------------------------------------------------------------ real runs


def test_the_row_of_a_real_run_is_its_summary(finished: Run) -> None:
    row, summary = one(finished.directory), finished.summary
    assert finished.twin is not None
    assert (row["run"], row["name"], row["seed"]) == (str(finished.directory), "tiny", 0)
    assert (row["task"], row["model"], row["attack"]) == ("vision / digits", "logistic", "data_poisoning")
    assert (row["trigger"], row["schedule"], row["partition"]) == ("patch", "continuous", "dirichlet")
    assert (row["defense"], row["undefended"], row["settings"]) == ("fedavg", True, "")
    assert (row["status"], row["message"]) == ("complete", "")
    assert (row["rounds"], row["t0"]) == (6, summary["t0"])
    assert row["main_accuracy"] == summary["final"]["main_accuracy"]
    assert row["asr"] == summary["final"]["asr"]
    assert row["asr_floor"] == finished.twin["asr"].iloc[-1]
    assert row["twin_accuracy"] == finished.twin["main_accuracy"].iloc[-1]
    assert row["stealth_final"] == pytest.approx(row["main_accuracy"] - row["twin_accuracy"])
    assert row["lifespan_50"] == summary["lifespan"]["0.5"]["rounds"]
    assert row["lifespan_50_censored"] == summary["lifespan"]["0.5"]["censored"]
    assert row["crossing_50"] == summary["lifespan"]["0.5"]["first_crossing"]["rounds"]
    assert row["malicious_weight"] == summary["detection"]["malicious_weight"]
    assert row["seconds"] > 0


def test_runs_that_differ_by_seed_and_engine_are_one_row_of_a_table(tmp_path: Path, tiny: dict[str, Any]) -> None:
    for name, more in (("a", {"seed": 1}), ("b", {"seed": 2, "name": "other"}), ("c", {"defense": ["krum"]})):
        run(tiny | more, out=tmp_path / name)
    frame = collect([tmp_path]).set_index("name", append=True).reset_index()
    assert len(frame) == 3
    rows = frame.groupby("defense")["row"].agg(["nunique", "count"])
    assert rows.loc["fedavg"].tolist() == [1, 2]
    assert frame["row"].nunique() == 2
    krum = frame[frame["defense"] == "krum"].iloc[0]
    assert krum["auroc_score"] == "krum.score"
    assert 0 <= krum["auroc"] <= 1
    assert not krum["undefended"]
    assert np.isnan(krum["asr_floor"])  # no twin was played


# ------------------------------------------------------------------------------------------- what is a run


def test_finds_runs_below_but_not_in_runs_nor_twins(make: Make, tmp_path: Path) -> None:
    kept = [make("x/a"), make("x/deep/er/b")]
    inside = make("x/a/twin")
    shared, hidden = make("x/twins/t"), make("x/.mirror/m")
    (tmp_path / "runs" / "empty").mkdir()
    assert list(run_directories(tmp_path)) == kept
    assert list(run_directories(shared)) == [shared]  # named outright it is looked at
    assert list(run_directories(inside)) == [inside]
    assert hidden.is_dir()


def test_a_run_found_twice_is_one_row(make: Make, tmp_path: Path) -> None:
    a = make("a")
    make("b", seed=1)
    assert len(collect([tmp_path, a, a / ".." / "a"])) == 2


def test_a_config_alone_is_no_run_but_one_that_failed_early_is(make: Make, tmp_path: Path) -> None:
    failed = make("failed", status="failed", reason="client 3 raised: boom", summary=None)
    (failed / "rounds.parquet").unlink()
    other = make("not_a_run")
    (other / "rounds.parquet").unlink()
    (other / "manifest.json").write_text(json.dumps({"what": "some other tool"}))
    row = one(tmp_path)
    assert row["run"] == str(failed)
    assert (row["status"], row["message"]) == ("failed", "client 3 raised: boom")
    assert np.isnan(row["asr"])
    assert not row["lifespan_50_censored"]


@pytest.mark.parametrize(
    ("status", "summary", "expected"),
    [
        ("finished", SUMMARY, "complete"),
        ("running", None, "running"),
        ("interrupted", None, "interrupted"),
        ("failed", None, "failed"),
    ],
)
def test_status_is_what_the_manifest_says(make: Make, status: str, summary: Any, expected: str) -> None:
    assert one(make("a", status=status, summary=summary))["status"] == expected


@pytest.mark.parametrize(("summary", "expected"), [(SUMMARY, "complete"), (None, "interrupted")])
def test_without_a_manifest_a_summary_tells_a_finished_run(make: Make, summary: Any, expected: str) -> None:
    directory = make("a", summary=summary)
    (directory / "manifest.json").unlink()
    row = one(directory)
    assert row["status"] == expected
    assert np.isnan(row["seconds"])


def test_missing_directories_and_directories_without_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        collect([tmp_path / "nowhere"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"bare holds no run.*config\.yaml"):
        collect([tmp_path / "bare"])


# ------------------------------------------------------------------------------------------------- numbers


def test_numbers_of_a_summary_land_in_their_columns(make: Make) -> None:
    row = one(make("a"))
    expected = {
        "t0": 9,
        "lifespan_25": 41,
        "lifespan_50": 12,
        "crossing_25": 9,
        "crossing_50": 9,
        "half_life": 7,
        "area_10": 0.5,
        "asr_at_10": 0.4,
        "time_to_inject_25": 2,
        "time_to_inject_50": 3,
        "main_accuracy": 0.9,
        "main_loss": 0.3,
        "asr": 0.2,
        "tpr": 0.25,
        "fpr": 0.125,
        "fpr_attack_rounds": 0.5,
        "auroc": 0.8,
        "seconds": 4.5,
    }
    assert {name: row[name] for name in expected} == expected
    missing = {name for name in MEASURES if np.isnan(row[name])}
    assert missing == set(MEASURES) - set(expected)
    assert [s for s in SPANS if row[f"{s}_censored"]] == ["lifespan_25", "half_life"]


@pytest.mark.parametrize(
    ("defense", "scores", "expected"),
    [
        (["krum", "flame"], ["flame.cosine", "krum.score"], "krum.score"),
        (["multi_metrics"], ["multi_metrics.cosine", "multi_metrics.score"], "multi_metrics.score"),
        (["flame"], ["flame.norm", "flame.cosine"], "flame.cosine"),
        (["quiet", "krum", "krum"], ["krum1.score", "krum2.a", "fedavg.a"], "krum1.score"),
        ([], [], ""),
    ],
)
def test_auroc_is_of_the_first_score_of_the_pipeline(
    make: Make, defense: list[str], scores: list[str], expected: str
) -> None:
    values = {name: 0.5 + i / 10 for i, name in enumerate(scores)}
    summary = changed(SUMMARY, {"detection.auroc": values})
    row = one(make("a", summary=summary, defense=[{"name": name} for name in defense]))
    assert row["auroc_score"] == expected
    assert row["auroc"] == pytest.approx(values.get(expected, np.nan), nan_ok=True)


def test_twin_numbers_are_those_of_its_last_evaluated_round(make: Make) -> None:
    directory = make("a", summary=SUMMARY | {"floor": "clean twin"})
    (directory / "twin").mkdir()
    table = pd.DataFrame(
        {"asr": [0.5, 0.2, None], "round": [1, 2, 3], "main_accuracy": [0.1, 0.7, None], "main_loss": [1.0, 2.0, 3.0]}
    )
    table.to_parquet(directory / "twin" / "rounds.parquet")
    row = one(directory)
    assert (row["asr_floor"], row["twin_accuracy"]) == (0.2, 0.7)
    (directory / "summary.json").write_text(json.dumps(SUMMARY))  # its numbers were made without a twin
    assert np.isnan(one(directory)["asr_floor"])


def test_dtypes_are_the_same_whatever_was_found(make: Make, tmp_path: Path) -> None:
    make("a")
    whole = collect([tmp_path])
    make("b", summary=None, status="running", seed=3)
    assert collect([tmp_path / "runs" / "b"]).dtypes.to_dict() == whole.dtypes.to_dict()
    for name in MEASURES:
        assert whole[name].dtype == np.float64
    for name in SPANS:
        assert whole[f"{name}_censored"].dtype == bool
    assert whole["seed"].dtype == np.int64


# -------------------------------------------------------------------------------------------------- labels


def test_a_label_names_the_method_and_only_the_parameters_that_differ(make: Make, tmp_path: Path) -> None:
    make("a")
    assert one(tmp_path)[list(LABELS)].tolist() == [
        "vision / mnist5k",
        "cnn",
        "pgd",
        "pixel_pattern",
        "continuous",
        "norm_clipping",
        "dirichlet",
    ]
    make("b", **{"defense": [{"name": "norm_clipping", "bound": 0.5}], "attack.schedule.stop": None})
    make("c", defense=[{"name": "krum", "f": 2}, {"name": "norm_clipping", "bound": 0.5}], attack=None)
    make("d", **{"defense": [], "attack.craft": [{"name": "scale", "factor": 10.0}], "attack.epsilon": 1.0})
    frame = collect([tmp_path])
    assert labels_of(frame, "defense") == [
        "fedavg",
        "krum + norm_clipping (bound=0.5)",
        "norm_clipping (bound=0.5)",
        "norm_clipping (bound=3.0)",
    ]
    assert labels_of(frame, "schedule") == ["continuous (stop=9)", "continuous (stop=null)", "none"]
    assert labels_of(frame, "attack") == [
        "none",
        "pgd (epsilon=1.0, craft=scale(factor=10.0))",
        "pgd (epsilon=2.0, craft=none)",
    ]
    assert frame["undefended"].tolist() == (frame["defense"] == "fedavg").tolist()


def test_settings_hold_the_other_keys_that_differ(make: Make, tmp_path: Path) -> None:
    make("a")
    make("b", **{"training.lr": 0.2, "federation.rounds": 60, "engine.name": "ray", "output.dir": "x", "name": "n"})
    make("c", **{"evaluation.twin": True, "seed": 4})
    frame = collect([tmp_path])
    assert labels_of(frame, "settings") == [
        "federation.rounds=50, training.lr=0.1",
        "federation.rounds=60, training.lr=0.2",
    ]
    assert frame.groupby("settings")["row"].nunique().tolist() == [1, 1]
    assert frame["row"].nunique() == 2


def test_a_long_value_is_cut_but_stays_distinct(make: Make, tmp_path: Path) -> None:
    for i in range(2):
        make(f"{i}", **{"attack.trigger": {"name": "text", "sentence": "x" * 100 + str(i)}})
    labels = labels_of(collect([tmp_path]), "trigger")
    assert len(labels) == 2
    assert all(len(label) < 80 for label in labels)


def test_a_grid_names_its_cells(make: Make, tmp_path: Path) -> None:
    make("grid/a", labels={"attack": "PGD", "defense": "clip", "data share": "low"}, **{"training.lr": 0.1})
    make("grid/b", labels={"attack": "PGD", "defense": "clip", "data share": "high"}, **{"training.lr": 0.9})
    make("old", seed=5)
    frame = collect([tmp_path])
    assert labels_of(frame, "attack") == ["PGD", "pgd"]
    assert dict(zip(frame["run"].map(lambda run: Path(run).name), frame["axis.data share"], strict=True)) == {
        "a": "low",
        "b": "high",
        "old": "",
    }
    told = frame[frame["attack"] == "PGD"]
    assert set(told["settings"]) == {""}  # the grid's own label says it
    assert frame.loc[frame["attack"] == "pgd", "settings"].tolist() == ["training.lr=0.1"]


def test_equal_labels_of_two_grids_are_told_apart(make: Make, tmp_path: Path) -> None:
    for grid, bound in (("one", 1.0), ("two", 2.0)):
        for seed in range(2):
            defense = [{"name": "norm_clipping", "bound": bound}]
            make(f"{grid}/{seed}", labels={"defense": "clip"}, defense=defense, seed=seed)
    frame = collect([tmp_path])
    assert labels_of(frame, "defense") == ["clip (bound=1.0)", "clip (bound=2.0)"]
    assert frame.groupby("defense")["seed"].agg(list).tolist() == [[0, 1], [0, 1]]


def test_what_a_grid_varies_within_one_label_is_not_hidden(make: Make, tmp_path: Path) -> None:
    for seed, lr in enumerate((0.1, 0.2)):
        make(f"grid/{seed}", labels={"attack": "PGD"}, seed=seed, **{"training.lr": lr})
    assert labels_of(collect([tmp_path]), "settings") == ["training.lr=0.1", "training.lr=0.2"]


def test_rows_are_sorted_and_do_not_depend_on_the_order_given(make: Make) -> None:
    b, a = make("b", seed=2), make("a", seed=10)
    c = make("c", **{"attack.name": "alie"})
    frames = [collect(order) for order in ([a, b, c], [c, b, a])]
    assert frames[0]["seed"].tolist() == [0, 2, 10]
    pd.testing.assert_frame_equal(*frames)


# ---------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.yaml", "a: [", "YAML"),
        ("config.yaml", "- a\n- b", "no mapping"),
        ("config.yaml", "seed: !!python/object/apply:os.system ['true']", "YAML"),
        ("config.yaml", "1: 2", "no text"),
        ("config.yaml", "seed: many", "seed"),
        ("config.yaml", b"name: \xff", "UTF-8"),
        (
            "config.yaml",
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "\n".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 10)}]" for p, c in zip("abcdef", "bcdefg", strict=True)),
            "more than",
        ),
        ("summary.json", "{", "JSON"),
        ("summary.json", "[1]", "no mapping"),
        ("summary.json", '{"final": 3}', "final|main_accuracy"),
        ("summary.json", '{"final": {"asr": "high"}}', "high"),
        ("summary.json", "[" * 100_000, "JSON"),
        ("summary.json", '{"t0": 1' + "0" * 400 + "}", "out of range"),
        ("manifest.json", "nonsense", "JSON"),
        ("cell.json", '{"labels": {"attack": 3}}', "labels"),
        ("cell.json", '{"labels": [3]}', "labels"),
    ],
)
def test_a_broken_file_is_named(make: Make, name: str, content: str | bytes, expected: str) -> None:
    path = make("a") / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=expected) as caught:
        collect([path.parent])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"no parquet", b"PAR1\x00\x00PAR1"])
def test_a_broken_twin_is_named(make: Make, content: bytes) -> None:
    directory = make("a", summary=SUMMARY | {"floor": "clean twin"})
    (directory / "twin").mkdir()
    (directory / "twin" / "rounds.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"twin/rounds\.parquet"):
        collect([directory])


def test_a_twin_without_the_columns_is_named(make: Make) -> None:
    directory = make("a", summary=SUMMARY | {"floor": "clean twin"})
    (directory / "twin").mkdir()
    pd.DataFrame({"round": [1]}).to_parquet(directory / "twin" / "rounds.parquet")
    with pytest.raises(InputError, match=r"twin/rounds\.parquet"):
        collect([directory])


# ------------------------------------------------------------------------------------------------ writing


def test_results_are_written_whole_and_the_same_every_time(make: Make, tmp_path: Path) -> None:
    make("a", labels={"share": 'low, "or" so'})
    make("b", summary=None, status="failed", reason="boom\nand, more")
    frame = collect([tmp_path])
    out = tmp_path / "runs" / "out"
    write_results(frame, out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    write_results(frame, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert sorted(first) == ["results.csv", "results.parquet"]
    read = pd.read_parquet(out / "results.parquet")
    assert read["run"].tolist() == [f"../{Path(path).name}" for path in frame["run"]]
    pd.testing.assert_frame_equal(read.drop(columns="run"), frame.drop(columns="run"))
    text = pd.read_csv(out / "results.csv", keep_default_na=False, dtype=str)
    assert text["message"].tolist() == frame["message"].tolist()
    assert text["lifespan_50"].tolist() == ["12.0", ""]
    assert frame["run"].iloc[0].startswith(str(tmp_path))  # the frame itself is not changed


def test_a_table_moves_with_its_runs(make: Make, tmp_path: Path) -> None:
    make("a")
    write_results(collect([tmp_path / "runs"]), tmp_path / "runs")
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    where = pd.read_parquet(tmp_path / "elsewhere" / "results.parquet")["run"].iloc[0]
    assert (tmp_path / "elsewhere" / where / "config.yaml").is_file()
