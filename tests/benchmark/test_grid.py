"""The definition of a benchmark: its cells, and whatever can be wrong with it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from attacks.anticipate import AnticipateParameters
from fedsim.benchmark.directory import check, is_held, opened
from fedsim.benchmark.grid import Cell, Grid, load_grid
from fedsim.config import config_directory, load_config, shipped
from fedsim.config.reading import find
from fedsim.errors import ConfigError, InputError
from tests.support.places import SHARED


@pytest.fixture
def bench(tiny: dict[str, Any]) -> dict[str, Any]:
    """A definition of 2 × 3 cells, two seeds each."""
    return {
        "base": tiny,
        "seeds": [1, 2],
        "grid": {
            "attack": ["data_poisoning", "neurotoxin"],
            "defense": {
                "fedavg": [],
                "clip": {"name": "norm_clipping", "bound": 1.0},
                "krum": {"name": "krum", "f": 1},
            },
        },
    }


def cell(grid: Grid, *labels: str, seed: int = 1) -> Cell:
    return next(c for c in grid.cells if tuple(c.labels.values()) == labels and c.seed == seed)


def told(grid: Grid) -> list[str]:
    return [str(problem) for problem in grid.problems]


def complaints(definition: dict[str, Any], *overrides: str) -> str:
    return "\n".join(told(load_grid(definition, overrides)))


# --------------------------------------------------------------------------------------------------- cells


def test_every_combination_with_every_seed_is_a_cell(bench, tiny):
    grid = load_grid(bench)
    grid.check()
    assert [c.name for c in grid.cells][:3] == [
        "data_poisoning--fedavg-seed1",
        "data_poisoning--fedavg-seed2",
        "data_poisoning--clip-seed1",
    ]
    assert len(grid.cells) == len({c.name for c in grid.cells}) == 12
    made = cell(grid, "neurotoxin", "clip", seed=2)
    assert made.labels == {"attack": "neurotoxin", "defense": "clip"}
    wanted = load_config(
        {**tiny, "seed": 2}, {"attack.name": "neurotoxin", "defense": ["norm_clipping"], "defense.0.bound": 1}
    )
    wanted.name, wanted.evaluation.twin = made.config.name, True
    assert made.config == wanted
    assert cell(grid, "neurotoxin", "clip").config.seed == 1


def test_an_attack_replaces_the_method_and_keeps_trigger_schedule_and_craft(bench):
    bench["base"]["attack"].update(name="anticipate", k=5, lr=0.3)
    bench["grid"] = {
        "attack": {
            "as it is": "anticipate",
            "shorter": {"name": "anticipate", "k": 2},
            "toxin": {"name": "neurotoxin", "poison_fraction": 0.25},
            "uncrafted": {"name": "neurotoxin", "set": {"attack.craft": [], "training.lr": 0.1}},
            "nobody": "none",
        }
    }
    grid = load_grid(bench)
    assert told(grid) == []
    sections = {label: cell(grid, label).config.to_dict()["attack"] for label in bench["grid"]["attack"]}
    assert sections["as it is"]["k"] == AnticipateParameters().k != 5, "an entry says all of its method"
    assert sections["shorter"]["k"] == 2
    assert "k" not in sections["toxin"]
    assert sections["toxin"]["poison_fraction"] == 0.25
    for section in sections.values():
        assert section["trigger"]["size"] == 3
        assert section["schedule"]["start"] == 3
        assert section["lr"] == 0.3
    assert [len(sections[label]["craft"]) for label in ("toxin", "uncrafted")] == [1, 0]
    assert cell(grid, "uncrafted").config.training.lr == 0.1
    assert cell(grid, "toxin").config.training.lr == 0.2


def test_short_names_of_axes_dotted_keys_and_labels_of_values(bench):
    bench["grid"] = {
        "trigger": ["patch", {"name": "blended", "alpha": 0.3}],
        "schedule": {"late": {"name": "single_shot", "rounds": [5]}},
        "partition": ["iid"],
        "training.lr": [0.1, 0.2],
        "training.augment": [True, False],
        "defense": [[], ["norm_clipping", {"name": "krum", "f": 1}]],
        "pace": {"slow": {"set": {"training.momentum": 0.5, "federation.rounds": 7}}},
    }
    grid = load_grid(bench)
    assert told(grid) == []
    made = cell(grid, "blended", "late", "iid", "0.2", "true", "norm_clipping+krum", "slow").config
    assert made.attack is not None
    assert (made.attack.trigger.name, made.attack.trigger.parameters.alpha) == ("blended", 0.3)
    assert made.attack.schedule.parameters.rounds == [5]
    assert made.federation.partition.name == "iid"
    assert (made.training.lr, made.training.augment, made.training.momentum) == (0.2, True, 0.5)
    assert [stage.name for stage in made.defense] == ["norm_clipping", "krum"]
    assert made.federation.rounds == 7
    assert len(grid.cells) == 2 * 2 * 2 * 2 * 2


def test_what_holds_for_all_cells_and_the_command_line(bench):
    bench["set"] = {"training.lr": 0.1, "attack.lr": 0.5}
    bench["grid"]["attack"] = {"mild": {"name": "data_poisoning", "lr": 0.05}, "usual": "data_poisoning"}
    grid = load_grid(bench, ["training.lr=0.3", "seeds=[7]", "grid.defense=[fedavg]", "set.training.batch_size=8"])
    assert told(grid) == []
    assert [c.name for c in grid.cells] == ["mild--fedavg-seed7", "usual--fedavg-seed7"]
    mild, usual = (c.config for c in grid.cells)
    assert (mild.training.lr, mild.training.batch_size) == (0.3, 8)
    assert mild.attack is not None
    assert usual.attack is not None
    assert (mild.attack.lr, usual.attack.lr) == (0.05, 0.5), "an axis knows better than what holds for all"
    one = load_grid(bench, ["grid.attack.usual={name: neurotoxin, ratio: 0.2}", "grid.defense.clip=[]"])
    assert cell(one, "usual", "clip").config.attack.parameters.ratio == 0.2  # type: ignore[union-attr]


def test_cells_that_are_excluded_are_not_there(bench):
    bench["exclude"] = [{"attack": "neurotoxin", "defense": ["clip", "krum"]}]
    grid = load_grid(bench)
    assert told(grid) == []
    assert [tuple(c.labels.values()) for c in grid.cells if c.seed == 1] == [
        ("data_poisoning", "fedavg"),
        ("data_poisoning", "clip"),
        ("data_poisoning", "krum"),
        ("neurotoxin", "fedavg"),
    ]


def test_a_seed_that_other_keys_are_made_of_is_followed(bench):
    bench["base"]["federation"]["clients"] = "${seed}"
    bench["base"]["federation"]["clients_per_round"] = 4
    bench["seeds"] = [8, 3]
    assert "federation.clients_per_round: 4 cannot be sampled from 3" in complaints(bench)
    bench["seeds"] = [8, 9]
    assert [c.config.federation.clients for c in load_grid(bench).cells[:2]] == [8, 9]


@pytest.mark.parametrize(
    "labels",
    [
        ["a/b", "../..", ".hidden", "-rf", "a b", "Ünïcode", "a--b", "a_b", "a" * 300, "a" * 299 + "b", "", "x\0y\n"],
        ["krum", "Krum ", "κ ≤ 50 %"],
    ],
)
def test_names_of_directories_are_safe_and_tell_cells_apart(bench, labels):
    bench["grid"] = {"training.lr": {label: 0.1 + i / 100 for i, label in enumerate(labels)}, "attack": ["neurotoxin"]}
    grid = load_grid(bench)
    assert told(grid) == []
    names = {c.name.casefold() for c in grid.cells}
    assert len(names) == 2 * len(labels)
    for name in names:
        assert len(name) < 200
        assert Path(name).name == name
        assert name.isascii()
        assert name[0] not in ".-"
        assert not set(name) & set("/\\\0\n '\"$*?")
    assert load_grid({**bench, "grid": {"attack": ["neurotoxin"], "training.lr": {labels[0]: 0.1}}}).cells[0].name in {
        f"neurotoxin--{c.name.partition('--neurotoxin')[0]}-seed1" for c in grid.cells
    }, "the name of a label does not depend on the others"


# -------------------------------------------------------------------------------------------- what is wrong


def test_everything_that_is_wrong_is_told_together(bench):
    bench.update(
        {
            "grids": {},
            "training": {"lr": 1},
            "seeds": [1, 1, "x", -3],
            "twin": "sometimes",
            "set": {"seed": 4, "training.lrr": 0.1, "defense": []},
            "exclude": [{"atack": "pgd", "defense": "clipp"}],
        }
    )
    bench["grid"]["attack"] = ["neurotoxn", {"name": "data_poisoning", "poison_fraction": 7}]
    text = complaints(bench)
    for part in (
        "grids: unknown key; did you mean 'grid'?",
        "training: unknown key; to change the experiment: set.training",
        "seeds: 1 appear",
        "'x', -3",
        "twin: expected true or false, got 'sometimes'",
        "set.seed: give seeds",
        "set.defense: it is an axis of the grid, and an axis decides; use grid.defense",
        "exclude.0.atack: there is no axis 'atack'; did you mean 'attack'?",
        "exclude.0.defense: there is no label 'clipp'; did you mean 'clip'?",
        "training.lrr: unknown key; did you mean 'lr'?",
        "(in all cells)",
        "neurotoxn",
        "attack.poison_fraction:",
        "(in data_poisoning · fedavg and 2 more)",
    ):
        assert part in text, (part, text)
    assert text.count("training.lrr") == 1, "the same thing is told once"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"base": None}, "base: name the experiment"),
        ({"base": "quickstrat"}, "did you mean 'quickstart'?"),
        ({"base": 7}, "base: name the experiment"),
        ({"grid": None}, "grid: the grid is empty"),
        ({"grid": {}}, "grid: the grid is empty; name at least one axis"),
        ({"grid": ["attack"]}, "grid: expected axes, got ['attack']"),
        ({"grid": {"attack": []}}, "grid.attack: expected {LABEL: value, …} or [value, …] with entries, got []"),
        ({"grid": {"attack": "pgd"}}, "grid.attack: expected"),
        ({"grid": {"seed": [1, 2]}}, "grid.seed: give seeds: [1, 2], not an axis"),
        ({"grid": {"trigger": ["patch"], "attack.trigger": ["patch"]}}, "another axis changes attack.trigger already"),
        ({"grid": {"defence": ["krum"]}}, "defence: unknown key; did you mean 'defense'?"),
        ({"grid": {"defense": [{"name": "krum", "f": 1}, {"name": "krum", "f": 0}]}}, "two entries are called 'krum'"),
        ({"grid": {"defense": {"a": {"set": 3}}}}, "grid.defense.a.set: expected {KEY.PATH: value, …}, got 3"),
        ({"exclude": [{"attack": ["data_poisoning", "neurotoxin"]}]}, "every cell of the grid is excluded"),
        ({"exclude": "attack"}, "exclude: expected"),
        ({"set": ["lr"]}, "set: expected"),
        ({"seeds": []}, "seeds: expected a list of at least one"),
        ({"seeds": 3}, "seeds: expected a list"),
        ({"seeds": [True]}, "seeds: expected whole numbers >= 0"),
        ({"set": {"attack.k": 3}}, "set.attack.k: it changes no cell"),
        ({"set": {"federation.dropout": 0.9}, "grid": {"defense": ["multi_metrics"]}}, "drop-out and stragglers"),
        ({"base": "${nowhere}"}, "base"),
        ({"set": {"training.lr": "${nowhere.at.all}"}}, "nowhere"),
    ],
)
def test_bad_definitions(bench, change, told):
    grid = load_grid({**bench, **change})
    assert told in "\n".join(map(str, grid.problems))
    with pytest.raises(ConfigError, match="problem"):
        grid.check()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("base.training.lr=0.1", "base.training.lr: write training.lr=…"),
        ("seeds.0=1", "seeds.0: write seeds=… as a whole"),
        ("defense=[krum]", "set.defense: it is an axis of the grid"),
        ("seed=3", "set.seed: give seeds"),
        ("grid.defense.krum={name: krum, g: 1}", "defense.0.g: unknown key"),
    ],
)
def test_bad_overrides(bench, override, told):
    assert told in complaints(bench, override)


def test_a_change_for_all_cells_that_reaches_none_is_refused(bench):
    bench["base"]["attack"]["name"] = "anticipate"
    for attack in ([], ["grid.attack.anticipate=anticipate"]):
        text = complaints(bench, "attack.k=3", *attack)
        assert "set.attack.k: it changes no cell, since 'attack' is an axis; change its entries (grid.attack)" in text
    assert complaints(bench, "attack.lr=3", "attack.trigger.size=2") == ""


def test_duplicate_cells_are_refused(bench):
    bench["grid"]["defense"]["clip again"] = [{"name": "norm_clipping", "bound": 1.0}]
    text = complaints(bench)
    assert "data_poisoning · clip · seed 1 and data_poisoning · clip again · seed 1 are the same experiment" in text
    assert text.count("are the same experiment") == 4


def test_a_difference_that_no_result_depends_on_does_not_make_another_cell(bench):
    bench["grid"]["where"] = {"here": {"set": {"output.dir": "a"}}, "there": {"set": {"engine.workers": 2}}}
    assert "are the same experiment" in complaints(bench)


def test_a_file_that_only_this_machine_lacks_is_told_apart(bench, tmp_path):
    bench["base"]["task"]["data"] = {"name": "parquet", "path": str(tmp_path / "nowhere")}
    grid = load_grid(bench)
    assert len(grid.cells) == 12
    assert grid.problems
    assert all(problem.absent for problem in grid.problems)


# ------------------------------------------------------------------------------------------------- as files


def test_a_definition_is_written_so_that_it_reads_back(bench, tmp_path):
    bench["base"]["training"]["momentum"] = "${training.lr}"
    bench["set"] = {"training.lr": 1e-3, "attack.trigger.size": 2}
    bench["grid"]["attack"] = {
        "1e-3": {"name": "neurotoxin", "set": {"attack.craft": []}},
        "yes": "data_poisoning",
        "${odd}": {"set": {"attack.poison_fraction": 0.1}},
    }
    bench["exclude"] = [{"attack": ["yes"], "defense": "krum"}]
    bench["twin"] = False
    grid = load_grid(bench)
    assert told(grid) == []
    path = tmp_path / "bench.yaml"
    path.write_text(grid.definition.to_yaml(), encoding="utf-8")
    again = load_grid(path)
    assert told(again) == []
    assert again.cells == grid.cells
    assert again.definition.to_yaml() == grid.definition.to_yaml()
    assert {c.config.training.momentum for c in again.cells} == {0.001}


def test_the_base_lies_beside_the_definition_and_unsafe_yaml_is_refused(bench, tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(bench["base"]))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({**bench, "base": "own.yaml"}))
    monkeypatch.chdir("/")
    assert len(load_grid(tmp_path / "b.yaml").cells) == 12
    (tmp_path / "own.yaml").write_text("defaults: nowhere\n")
    assert "base, nowhere" in complaints({**bench, "base": str(tmp_path / "own.yaml")})
    for text in ("!!python/object/apply:os.system [ls]", "a: 1\na: 2", "- 1", "\0", "grid: [", ""):
        (tmp_path / "b.yaml").write_text(text)
        with pytest.raises(ConfigError):
            load_grid(tmp_path / "b.yaml").check()


SHIPPED = sorted((config_directory() / "bench").glob("*.yaml"))


def test_the_shipped_benchmarks_are_no_configs_of_one_experiment():
    names = shipped(benches=True)
    assert {"quick", "mnist_writers", "cifar10", "text"} == set(names)
    assert not set(names) & set(shipped())
    assert not any("bench" in name for name in shipped())
    assert find("quick", benches=True) == config_directory() / "bench" / "quick.yaml"
    with pytest.raises(ConfigError, match="no shipped benchmark of that name; did you mean 'quick'"):
        find("quik", benches=True)
    with pytest.raises(ConfigError, match="no shipped config of that name"):
        find("quick")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_benchmark_is_right(path, monkeypatch):
    if "FEDSIM_DATA" not in os.environ and (SHARED / "data").is_dir():
        monkeypatch.setenv("FEDSIM_DATA", str(SHARED / "data"))
    grid = load_grid(path.stem)
    lacking = [problem for problem in grid.problems if problem.absent]
    assert [p for p in grid.problems if not p.absent] == []
    attacks, defenses = ({c.labels[axis] for c in grid.cells} for axis in ("attack", "defense"))
    assert len(grid.cells) == len(attacks) * len(defenses) * len(grid.definition.seeds)
    if path.stem == "quick":
        assert (len(attacks), len(defenses), len(grid.definition.seeds)) == (3, 5, 2)
    assert "/home/" not in path.read_text(encoding="utf-8")
    if lacking:
        pytest.skip(f"needs data that is not here: {lacking[0]}; set FEDSIM_DATA to the directory that has it")


# ------------------------------------------------------------------------------------------ its directory


def reopen(out: Path, definition: dict[str, Any]) -> None:
    grid = load_grid(definition)
    grid.check()
    with opened(out, grid):
        pass


def test_a_grid_may_grow_and_nothing_else(bench, tmp_path):
    out = tmp_path / "out"
    bench["grid"] = {"attack": ["data_poisoning"], "defense": {"clip": {"name": "norm_clipping", "bound": 1.0}}}
    reopen(out, bench)
    written = (out / "bench.yaml").read_text()
    reopen(out, copy.deepcopy(bench))
    assert (out / "bench.yaml").read_text() == written
    grown = copy.deepcopy(bench)
    grown["seeds"] = [1, 2, 3]
    grown["grid"]["attack"].insert(0, "pgd")
    reopen(out, grown)
    assert (out / "bench.yaml").read_text() != written
    assert not list(out.glob(".*"))
    reopen(out, {**grown, "base": {**grown["base"], "output": {"report": True}, "engine": {"workers": 7}}})

    def refused(**change: Any) -> str:
        before = (out / "bench.yaml").read_bytes()
        with pytest.raises(InputError, match="holds another benchmark") as error:
            reopen(out, {**copy.deepcopy(grown), **change})
        assert (out / "bench.yaml").read_bytes() == before
        return str(error.value)

    assert "cells that are not in the grid any more: pgd--clip-seed1, data_poisoning--clip-seed1" in refused(
        seeds=[2, 3]
    )
    assert "training.lr (in pgd--clip-seed1 and 5 more)" in refused(set={"training.lr": 0.1})
    assert "twin: true there, false here" in refused(twin=False)
    other = copy.deepcopy(grown["grid"])
    other["defense"]["clip"]["bound"] = 2.0
    assert "defense.0.bound (in pgd--clip-seed1 and 5 more)" in refused(grid=other)


def test_a_directory_of_something_else_is_left_alone(bench, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        reopen(tmp_path / "file", bench)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds files, but no benchmark"):
        reopen(tmp_path / "full", bench)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "bench.yaml").write_text("a: [")
    with pytest.raises(InputError, match="cannot be read any more"):
        reopen(tmp_path / "odd", bench)


def test_a_second_benchmark_is_kept_out_while_one_is_at_work(bench, tmp_path):
    grid = load_grid(bench)
    with opened(tmp_path / "out", grid):
        assert is_held(tmp_path / "out")
        with pytest.raises(InputError, match="another benchmark is at work"):
            reopen(tmp_path / "out", bench)
        assert is_held(tmp_path / "out"), "the first one's lock is still there"
    assert not is_held(tmp_path / "out")
    reopen(tmp_path / "out", bench)


# ------------------------------------------------------------------------------------------ the command line


def test_a_dry_run_lists_the_cells_and_writes_nothing(cli, bench, tmp_path):
    path = tmp_path / "b.yaml"
    path.write_text(yaml.safe_dump(bench, sort_keys=False))
    done = cli("bench", path, "--dry-run", "--out", tmp_path / "out", "seeds=[5]")
    assert done.status == 0, done.text
    assert "neurotoxin · krum · seed 5  6 rounds" in done.out
    assert "clean twin · krum · seed 5  6 rounds" in done.out
    assert "6 cells, 3 clean twins, 54 rounds" in done.out
    assert not (tmp_path / "out").exists()
    wrong = cli("bench", path, "--dry-run", "--out", tmp_path / "out", "training.rl=5", "grid.attack=[neurotoxn]")
    assert wrong.status == 2
    assert "training.rl: unknown key" in wrong.err
    assert "neurotoxin" in wrong.err
    bench["base"]["task"]["data"] = {"name": "parquet", "path": str(tmp_path / "nowhere")}
    path.write_text(yaml.safe_dump(bench, sort_keys=False))
    lacking = cli("bench", path, "--dry-run")
    assert lacking.status == 0
    assert "this machine lacks a file" in lacking.out
    assert "12 cells" in lacking.out


@pytest.mark.parametrize("arguments", [("bench", "nowhere"), ("bench",), ("bench", "quick", "--jobs", "0")])
def test_bad_commands(cli, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli(*arguments)
    assert done.status == 2
    assert list(tmp_path.iterdir()) == []


def test_a_bad_definition_makes_no_directory(cli, bench, tmp_path):
    path = tmp_path / "b.yaml"
    bench["base"]["task"]["data"] = {"name": "parquet", "path": str(tmp_path / "nowhere")}
    path.write_text(yaml.safe_dump({**bench, "girds": 1}, sort_keys=False))
    done = cli("bench", path, "--out", tmp_path / "out")
    assert done.status == 2
    assert "girds: unknown key; did you mean 'grid'?" in done.err
    assert "nowhere" in done.err
    assert not (tmp_path / "out").exists()


def test_the_help_teaches(cli):
    text = cli("bench", "--help").text
    for part in ("base: quickstart", "seeds: [1, 2]", "attack: [data_poisoning", "--dry-run", "exit status is 1"):
        assert part in text


# ------------------------------------------------------------------------------------ what is no benchmark


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        (["attack"], "grid: expected axes, got ['attack']"),
        ("attack", "grid: expected axes, got 'attack'"),
        ({"defense": "krum"}, "grid.defense: expected {LABEL: value, …} or [value, …] with entries, got 'krum'"),
        ({"defense": 3}, "grid.defense: expected"),
    ],
)
def test_an_override_of_a_grid_that_is_none_is_told(bench, grid, told):
    assert told in complaints({**bench, "grid": grid}, "grid.defense.clip={name: norm_clipping, bound: 2}")


def test_one_experiment_is_no_benchmark(bench, tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump(bench["base"]))
    for given in (file, "quickstart"):
        with pytest.raises(ConfigError, match="this is one experiment, not a benchmark; play it with fedsim run"):
            load_grid(given)
    file.write_text(yaml.safe_dump({"name": "mine", "seeds": [1]}))
    assert "the grid is empty" in "\n".join(told(load_grid(file)))
    assert load_grid(file, [f"base={find('quickstart')}", "grid.defense=[krum]"]).cells[0].labels == {"defense": "krum"}
    (tmp_path / "quickstart").write_text(yaml.safe_dump(bench))
    assert len(load_grid(tmp_path / "quickstart").cells) == 12


def test_what_lies_in_the_way_is_told_and_left_alone(bench, tmp_path):
    grid, out = load_grid(bench), tmp_path / "out"
    check(out, grid)
    assert not out.exists()
    reopen(out, bench)
    check(out, grid)
    other = load_grid(bench, ["seeds=[2]"])
    with pytest.raises(InputError, match=r"holds another benchmark.*\n.*not in the grid any more: data_poisoning--fed"):
        check(out, other)
    (out / "bench.yaml").unlink()
    check(out, other)
    (out / "mine.txt").touch()
    with pytest.raises(InputError, match="holds files, but no benchmark"):
        check(out, grid)
    with pytest.raises(InputError, match=r"mine\.txt is a file"):
        check(out / "mine.txt", grid)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
