"""Configuration: what wins over what, everything wrong reported together, and nothing but ConfigError."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import plugins
from fedsim.config import Config, build, config_directory, find, load_config, render_base, shipped
from fedsim.errors import ConfigError
from fedsim.federation.schedule import plan, plan_problems
from fedsim.tasks.sources import ParquetDirectory
from tests.support.malformed import paths

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function writing a file of a config into the test's directory."""

    def put(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return put


def problems(source: Any, overrides: Any = ()) -> dict[str, str]:
    """Path → message of everything wrong with a config."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    found = {problem.path: problem.message for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems), "two problems at one place"
    return found


# ---------------------------------------------------------------------------------------------- precedence


def test_parent_then_child_then_command_line(write):
    write("parent.yaml", "seed: 1\ntraining: {lr: 0.1, momentum: 0.5, batch_size: 8}\n")
    child = write("child.yaml", "defaults: parent\ntraining: {lr: 0.2, momentum: 0.6}\n")
    config = load_config(child, ["training.lr=0.3"])
    assert (config.training.lr, config.training.momentum, config.training.batch_size) == (0.3, 0.6, 8)
    assert config.seed == 1
    assert config.training.local_epochs == Config().training.local_epochs


def test_later_parents_win_over_earlier_ones_and_grandparents_lose(write):
    write("root.yaml", "seed: 1\nfederation: {rounds: 11, clients: 12}\n")
    write("a.yaml", "defaults: root\nseed: 2\nfederation: {rounds: 21}\n")
    write("b.yaml", "federation: {rounds: 31}\n")
    config = load_config(write("c.yaml", "defaults: [a, b]\n"))
    assert (config.seed, config.federation.rounds, config.federation.clients) == (2, 31, 12)
    config = load_config(write("d.yaml", "defaults: [b, a]\n"))
    assert config.federation.rounds == 21


def test_one_parent_by_two_ways_is_no_circle(write):
    write("root.yaml", "seed: 4\n")
    write("a.yaml", "defaults: root\n")
    write("b.yaml", "defaults: root\n")
    assert load_config(write("c.yaml", "defaults: [a, b]\n")).seed == 4


def test_parent_by_relative_path_and_by_shipped_name(write, monkeypatch, tmp_path):
    write("common/parent.yaml", "seed: 7\n")
    child = write("deep/child.yaml", "defaults: ../common/parent.yaml\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config(child).seed == 7
    assert load_config(write("of_shipped.yaml", "defaults: quickstart\n")) == load_config(
        "quickstart", {"name": "of_shipped"}
    )


def test_a_file_beside_the_child_wins_over_a_shipped_one(write):
    write("quickstart.yaml", "seed: 99\n")
    assert load_config(write("child.yaml", "defaults: quickstart\n")).seed == 99


def test_a_name_is_the_files_own(write):
    write("parent.yaml", "name: theirs\n")
    assert load_config(write("child.yaml", "defaults: parent\n")).name == "child"
    assert load_config(write("named.yaml", "defaults: parent\nname: mine\n")).name == "mine"
    assert load_config(write("child.yaml", "defaults: parent\n"), ["name=given"]).name == "given"
    assert load_config({}).name == "experiment"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_circles_are_named(write, length):
    for i in range(length):
        write(f"c{i}.yaml", f"defaults: c{(i + 1) % length}\n")
    found = problems(write("c0.yaml", f"defaults: c{1 % length}\n"))
    assert found.keys() == {"defaults"}
    assert "circle" in found["defaults"]
    assert all(f"c{i}.yaml" in found["defaults"] for i in range(length))


def test_missing_parent_names_it_and_the_nearest(write):
    found = problems(write("child.yaml", "defaults: quikstart\n"))
    assert "did you mean 'quickstart'" in found["quikstart"]


@pytest.mark.parametrize("value", ["5", "{a: 1}", "[base, 3]", "[[base]]"])
def test_parents_are_names(write, value):
    assert "parent" in problems(write("child.yaml", f"defaults: {value}\n"))["defaults"]


@pytest.mark.parametrize("name", ["nowhere", "nowhere.yaml", "..", "", "x" * 5000, "a\0b", "/nowhere/at/all.yaml"])
def test_a_file_that_is_not_there(name):
    with pytest.raises(ConfigError, match="no such file"):
        find(name)


# ------------------------------------------------------------------------------------------- what YAML says


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.25", 0.25), ("1e-3", 1e-3), ("1E-3", 1e-3), ("1", 1.0), ("1_000", 1000.0), ("${federation.server_lr}", 1.0)],
)
def test_numbers_in_files_and_overrides(write, text, value):
    assert load_config("base", [f"training.lr={text}"]).training.lr == value
    assert load_config(write("c.yaml", f"defaults: base\ntraining:\n  lr: {text}\n")).training.lr == value


def test_booleans_lists_and_nulls_on_the_command_line():
    config = load_config(
        {},
        [
            "training.augment=true",
            "evaluation.twin=True",
            "attack.schedule={name: single_shot, rounds: [3, 5]}",
            "task.train_examples=null",
            "training.warm_start=",
            "defense=[krum, {name: norm_clipping, bound: 2}]",
        ],
    )
    assert config.training.augment is True
    assert config.evaluation.twin is True
    assert config.attack is not None
    assert config.attack.schedule.parameters.rounds == [3, 5]
    assert config.task.train_examples is None
    assert config.training.warm_start is None
    assert [stage.name for stage in config.defense] == ["krum", "norm_clipping"]


def test_interpolation(write, monkeypatch):
    monkeypatch.setenv("FEDSIM_TEST_SEED", "5")
    file = write(
        "c.yaml", "seed: ${oc.env:FEDSIM_TEST_SEED}\nname: s${seed}\ntraining: {lr: '${federation.server_lr}'}\n"
    )
    config = load_config(file, ["federation.server_lr=0.5"])
    assert (config.seed, config.name, config.training.lr) == (5, "s5", 0.5)


@pytest.mark.parametrize("value", ["${nothing.there}", "${", "${a:b:c}", "${seed}", "${oc.env:FEDSIM_NOT_SET}", "???"])
def test_interpolation_that_leads_nowhere(value):
    assert problems({"seed": value})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seed: 1\nseed: 2\n", "duplicate"),
        (b"training:\n  lr: 0.1\n  lr: 0.2\n", "duplicate"),
        (b"training:\n\tlr: 0.1\n", "not valid YAML"),
        (b"training: {lr: 0.1\n", "not valid YAML"),
        (b"a: b: c\n", "not valid YAML"),
        (b"seed: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"- seed\n- 1\n", "mapping"),
        (b"just text\n", "just text"),
        (b"5\n", "cannot be read"),
        (b"name: \xff\xfe\xfa\n", "cannot be read"),
        (b"name: caf\xe9\n", "cannot be read"),
        (b"seed: \x00\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, said):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert said in str(caught.value).replace("found duplicate key", "duplicate")
    assert "bad.yaml" in str(caught.value)


def test_a_directory_is_no_config(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "folder.yaml")


def test_an_empty_file_is_the_defaults(write):
    assert (
        load_config(write("experiment.yaml", ""))
        == load_config({})
        == load_config(write("experiment.yaml", "# nothing\n"))
    )


@pytest.mark.parametrize(
    "text", ["training.lr", "=3", "", "  =3", "training.lr=[1", "training.lr={", "training.lr=a: b: c"]
)
def test_overrides_that_are_none(text):
    assert len(problems({}, [text])) == 1


def test_all_broken_overrides_are_reported_at_once():
    assert len(problems({}, ["nothing", "seed=[1", "=3"])) == 3


# ------------------------------------------------------------------------------------- choosing plugins


def test_a_string_is_short_for_a_name():
    config = load_config({"task": {"data": "digits", "model": "logistic"}, "attack": "neurotoxin", "defense": "krum"})
    long = {
        "task": {"data": {"name": "digits"}, "model": {"name": "logistic"}},
        "attack": {"name": "neurotoxin"},
        "defense": [{"name": "krum"}],
    }
    assert config == load_config(long) == load_config({**long, "defense": {"name": "krum"}})
    assert load_config({"defense": []}).defense == load_config({"defense": None}).defense == []


def test_no_adversary_at_all(tmp_path):
    config = load_config({"attack": None})
    assert config.attack is None
    assert load_config("quickstart", ["attack=null"]).attack is None
    assert not any(round.malicious for round in plan(config))
    back = load_config({"attack": None}, ["attack.name=pgd"])
    assert back.attack is not None
    assert back.attack.name == "pgd"


BASE = {
    "attack": {
        "name": "anticipate",
        "k": 4,
        "poison_fraction": 0.25,
        "lr": 0.3,
        "trigger": {"name": "patch", "size": 2, "target": 5},
        "schedule": {"name": "random_rounds", "count": 3, "start": 10, "stop": 20},
        "craft": ["scale"],
    },
    "defense": [{"name": "norm_clipping", "bound": 6.0}, {"name": "krum", "f": 2}],
}


@pytest.mark.parametrize("override", [["attack.name=neurotoxin"], ["attack=neurotoxin"], ["attack={name: neurotoxin}"]])
def test_another_attack_drops_its_own_parameters_and_keeps_the_rest(override):
    config = load_config(BASE, override)
    expected = copy.deepcopy(BASE)
    expected["attack"]["name"] = "neurotoxin"
    del expected["attack"]["k"]
    assert config == load_config(expected)


def test_the_same_name_keeps_the_parameters():
    assert load_config(BASE, ["attack.name=anticipate"]) == load_config(BASE)


def test_another_trigger_and_schedule_drop_their_parameters():
    config = load_config(BASE, ["attack.trigger=pixel_pattern", "attack.schedule.name=continuous"])
    assert config.attack is not None
    assert config.attack.trigger.to_dict() == load_config({}).attack.trigger.to_dict()
    assert config.attack.schedule.parameters.start == 1
    assert config.attack.parameters.k == 4


def test_a_child_file_drops_its_parents_parameters_too(write):
    write("parent.yaml", yaml.safe_dump(BASE))
    child = write("child.yaml", "defaults: parent\nattack: {name: pgd, trigger: dba}\n")
    config = load_config(child)
    assert config.attack is not None
    assert config.attack.name == "pgd"
    assert config.attack.trigger.name == "dba"
    assert config.attack.schedule.name == "random_rounds"


@pytest.mark.parametrize(
    "overrides",
    [
        ["attack.name=anticipate", "attack.k=5"],
        ["attack.k=5", "attack.name=anticipate"],
        ["attack.k=5", "attack=anticipate"],
        ["attack=anticipate", "attack.k=5"],
        {"attack.k": 5, "attack.name": "anticipate"},
    ],
)
def test_name_and_parameter_in_either_order(overrides):
    config = load_config({"attack": {"name": "pgd"}}, overrides)
    assert config.attack is not None
    assert config.attack.name == "anticipate"
    assert config.attack.parameters.k == 5


@pytest.mark.parametrize(
    "defense",
    ["norm_clipping", ["norm_clipping"], {"name": "norm_clipping"}, [{"name": "norm_clipping", "bound": 6.0}]],
)
def test_one_stage_overridden_by_its_number(defense):
    stage = load_config({"defense": defense}, ["defense.0.bound=3"]).defense[0]
    assert (stage.name, stage.parameters.bound) == ("norm_clipping", 3.0)
    for overrides in (["defense.0.f=1", "defense.0.name=krum"], ["defense.0=krum", "defense.0.f=1"]):
        stage = load_config({"defense": defense}, overrides).defense[0]
        assert (stage.name, stage.parameters.f) == ("krum", 1)


def test_numbers_in_paths_reach_lists_and_leave_the_others_alone():
    config = load_config(BASE, ["defense.1.f=3", "attack.craft.0=project"])
    assert config.defense[0] == load_config(BASE).defense[0]
    assert config.defense[1].parameters.f == 3
    assert config.attack is not None
    assert config.attack.craft[0].name == "project"
    single = load_config(
        {"attack": {"schedule": {"name": "single_shot", "rounds": [3, 4]}}}, ["attack.schedule.rounds.1=9"]
    )
    assert single.attack is not None
    assert single.attack.schedule.parameters.rounds == [3, 9]


@pytest.mark.parametrize("override", ["defense.2.bound=3", "defense.0.bound=3", "attack.craft.0.factor=2", "seed.0=1"])
def test_numbers_in_paths_that_reach_nothing(override):
    base = BASE if override.startswith("defense.2") else {}
    assert "no entry" in problems(base, [override])[override.split("=")[0]]


def test_the_given_mapping_is_left_alone():
    given = copy.deepcopy(BASE)
    load_config(given, ["defense.0.bound=1", "attack.k=9", "attack.trigger.size=1"])
    assert given == BASE


# ------------------------------------------------------------------------------------ everything at once


def test_problems_of_a_file_are_reported_together_with_their_paths(write):
    file = write(
        "bad.yaml",
        """
seed: -1
taks: {}
task: {name: vison, data: {name: parquet, path: /nowhere/at/all}, model: {name: cnn, chanels: 3}}
federation: {clients: many, dropout: 1.0, weighting: fair}
training: {lr: .nan, momentum: [0.9], augment: 7, learning_rate: 1}
attack: {name: anticpate, trigger: 3, schedule: {name: weekly}, craft: [scal]}
defense: [{name: norm_clipping, bound: 0}, {bound: 3}, krumm]
evaluation: 5
engine: {workers: few, device: tpu, retries: -2}
""",
    )
    found = problems(file)
    assert set(found) == {
        "seed",
        "taks",
        "task.name",
        "task.data.path",
        "task.model.chanels",
        "federation.clients",
        "federation.dropout",
        "federation.weighting",
        "training.lr",
        "training.momentum",
        "training.augment",
        "training.learning_rate",
        "attack.name",
        "attack.trigger",
        "attack.schedule.name",
        "attack.craft.0.name",
        "defense.0.bound",
        "defense.1",
        "defense.2.name",
        "evaluation",
        "engine.workers",
        "engine.device",
        "engine.retries",
    }
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    text = str(caught.value)
    assert text.startswith(f"{len(found)} problems in {file}:\n")
    assert text.count("\n") == len(found)
    for path, message in found.items():
        assert f"\n  {path}: {message}" in text
    assert "did you mean 'task'" in found["taks"]
    assert "did you mean 'vision'" in found["task.name"]
    assert "did you mean 'channels'" in found["task.model.chanels"]
    assert "did you mean 'anticipate'" in found["attack.name"]
    assert "did you mean 'krum'" in found["defense.2.name"]
    assert "did you mean 'scale'" in found["attack.craft.0.name"]
    assert "a whole number" in found["federation.clients"]
    assert "true or false" in found["training.augment"]
    assert "[0, 1)" in found["federation.dropout"]
    assert "examples, uniform" in found["federation.weighting"]


def test_one_problem_is_one():
    with pytest.raises(ConfigError, match=r"^1 problem in the given mapping:\n  seed: "):
        load_config({"seed": -1})


@pytest.mark.parametrize("section", ["federation", "training", "evaluation", "engine", "output"])
@pytest.mark.parametrize("value", [5, "text", [], [1], True])
def test_sections_are_mappings(section, value):
    found = problems({section: value, "seed": -1})
    assert found.keys() == {section, "seed"}
    assert "mapping" in found[section]


@pytest.mark.parametrize("section", ["attack", "task"])
@pytest.mark.parametrize("value", [5, [], True, ["anticipate"]])
def test_a_method_is_a_name_or_a_mapping(section, value):
    assert problems({section: value, "seed": -1}).keys() == {section, "seed"}


@pytest.mark.parametrize("value", [5, None, [], {}, {"alpha": 1}, {"name": 3}, {"name": None}])
def test_a_plugin_is_a_name_or_a_mapping_with_one(value):
    found = problems({"federation": {"partition": value}})
    assert "dirichlet" in found["federation.partition"]


NUMBERS = [
    ("training.lr", 0.0),
    ("training.lr_decay", 1.01),
    ("training.momentum", 1.0),
    ("training.weight_decay", -1e-9),
    ("training.local_epochs", 0),
    ("training.local_steps", 0),
    ("training.batch_size", 0),
    ("federation.rounds", 0),
    ("federation.clients", 0),
    ("federation.stragglers", 1.0),
    ("federation.server_lr", 0.0),
    ("federation.clients", 10**30),
    ("attack.poison_fraction", 1.5),
    ("attack.lr", 0),
    ("evaluation.every", 0),
    ("output.checkpoint_every", 0),
    ("engine.workers", 0),
    ("engine.workers", -3),
    ("engine.cpus_per_worker", 0),
    ("task.train_examples", 0),
]


@pytest.mark.parametrize(("key", "value"), NUMBERS)
def test_out_of_range(key, value):
    assert problems({}, {key: value}).keys() == {key}


FLOATS = [
    "training.lr",
    "training.momentum",
    "training.weight_decay",
    "federation.server_lr",
    "federation.dropout",
    "attack.poison_fraction",
    "attack.lr",
    "federation.partition.alpha",
    "defense.0.bound",
]


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "NaN"])
def test_not_a_number_and_infinity(key, text):
    base = {"federation": {"partition": "dirichlet"}, "defense": ["norm_clipping"]}
    assert problems(base, [f"{key}={text}"]).keys() == {key}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1.5),
        ("seed", "one"),
        ("seed", True),
        ("seed", None),
        ("federation.rounds", [3]),
        ("training.lr", "fast"),
        ("training.lr", {}),
        ("training.lr", True),
        ("training.augment", "perhaps"),
        ("training.warm_start", ["a"]),
        ("name", None),
        ("name", ["a"]),
        ("plugins", "one.py"),
        ("output.dir", None),
        ("task.name", {"name": "vision"}),
    ],
)
def test_wrong_types(key, value):
    found = problems({}, {key: value})
    assert found.keys() == {key}
    assert "expected" in found[key]


def test_values_still_to_be_filled_in():
    rounds = {"name": "single_shot", "rounds": ["???"]}
    found = problems({"training": {"lr": "???"}, "attack": {"schedule": rounds}, "name": "???"})
    assert found.keys() == {"training.lr", "attack.schedule.rounds", "name"}


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        ({"federation": {"clients": 5, "clients_per_round": 6}}, "federation.clients_per_round"),
        ({"attack": {"schedule": {"name": "continuous", "stop": 101}}}, "attack.schedule.stop"),
        ({"attack": {"schedule": {"name": "continuous", "start": 101}}}, "attack.schedule.start"),
        ({"attack": {"schedule": {"name": "continuous", "start": 9, "stop": 8}}}, "attack.schedule.start"),
        ({"attack": {"schedule": {"name": "fixed_frequency", "stop": 101}}}, "attack.schedule.stop"),
        ({"attack": {"schedule": {"name": "single_shot", "rounds": [100, 101]}}}, "attack.schedule.rounds"),
        ({"attack": {"schedule": {"name": "single_shot", "rounds": []}}}, "attack.schedule.rounds"),
        ({"attack": {"schedule": {"name": "random_rounds", "count": 101}}}, "attack.schedule.count"),
        (
            {"attack": {"schedule": {"name": "random_rounds", "count": 12, "start": 10, "stop": 20}}},
            "attack.schedule.count",
        ),
        ({"attack": {"schedule": {"name": "pool", "start": 101}}}, "attack.schedule.start"),
        ({"attack": {"schedule": {"name": "pool", "stop": 101}}}, "attack.schedule.stop"),
        ({"attack": {"schedule": {"name": "continuous", "attackers": 11}}}, "attack.schedule.attackers"),
        ({"defense": ["coordinate_median", "rfa"]}, "defense.1"),
        ({"task": {"data": {"name": "parquet", "path": "/nowhere"}}}, "task.data.path"),
    ],
)
def test_impossible_together(raw, where):
    assert where in problems(raw)


def test_everybody_may_take_part_in_every_round():
    assert load_config({"federation": {"clients": 10, "clients_per_round": 10}})


def test_a_defense_that_needs_more_clients_than_take_part():
    found = problems({"federation": {"clients_per_round": 2}, "defense": ["fedavg", "krum"]})
    assert "needs at least 3 clients" in found["defense.1.name"]
    found = problems({"federation": {"clients_per_round": 4}, "defense": ["fedavg", {"name": "krum", "f": 2}]})
    assert found.keys() == {"defense.1.f"}
    assert load_config({"federation": {"clients_per_round": 5}, "defense": ["fedavg", {"name": "krum", "f": 2}]})


def test_drop_out_that_leaves_too_few_clients():
    raw = {"federation": {"clients_per_round": 5, "dropout": 0.4}, "defense": {"name": "krum", "f": 2}}
    config = load_config(raw)
    found = plan_problems(config, plan(config))
    assert [problem.path for problem in found] == ["defense.0.name"]
    least = min(plan(config), key=lambda round: len(round.replying))
    assert f"round {least.round}" in found[0].message
    assert f"leave {len(least.replying)}" in found[0].message
    calm = load_config(raw, ["federation.dropout=0"])
    assert plan_problems(calm, plan(calm)) == []


def test_wrong_sizes_do_not_hide_the_rest_and_conclude_nothing():
    found = problems(
        {"federation": {"rounds": "x"}, "engine": {"workers": "y"}, "task": {"name": "z"}, "defense": "krum"}
    )
    assert found.keys() == {"federation.rounds", "engine.workers", "task.name"}
    late = {"schedule": {"name": "continuous", "start": 500}}
    assert problems({"federation": {"rounds": "x"}, "attack": late}).keys() == {"federation.rounds"}
    sizes = {"clients": "x", "clients_per_round": 500}
    assert problems({"federation": sizes, "defense": {"name": "krum", "f": 400}}).keys() == {"federation.clients"}


def test_a_worker_need_not_have_the_drivers_files(tmp_path):
    data = {"name": "parquet", "path": str(tmp_path / "nowhere")}
    raw = {"training": {"warm_start": str(tmp_path / "model.safetensors")}, "task": {"data": data}}
    with pytest.raises(ConfigError) as caught:
        load_config(raw)
    assert {problem.path for problem in caught.value.problems} == {"training.warm_start", "task.data.path"}
    assert all(problem.absent for problem in caught.value.problems)
    assert build(raw, possible=False).task.data.parameters.path == str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="1 problem:\n  seed"):
        build({**raw, "seed": -1}, possible=False)


def test_nothing_is_loaded_before_the_config_is_right(monkeypatch):
    def load(self: object) -> None:
        raise AssertionError("data was loaded for a config that is wrong")

    monkeypatch.setattr(ParquetDirectory, "load", load)
    found = problems({"task": {"data": {"name": "parquet", "path": "/nowhere/at/all"}}, "trainning": {}})
    assert found.keys() == {"task.data.path", "trainning"}


# --------------------------------------------------------------------------------- the same config again


def test_base_is_the_schemas_rendering():
    file = config_directory() / "base.yaml"
    assert file.read_text(encoding="utf-8") == render_base(), "fedsim describe base > configs/base.yaml"
    assert load_config("base") == load_config({})


def test_base_says_and_documents_every_key():
    lines = render_base().splitlines()
    stated = yaml.safe_load(render_base())
    plain = load_config({}).to_dict()
    assert stated == plain
    for line in lines[3:]:
        assert not line or "#" in line or line.strip().startswith("name: "), line


def test_every_shipped_name_is_found():
    assert {"base", "quickstart"} <= set(shipped())
    assert all(find(name).is_file() for name in shipped())


SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "name": st.text(min_size=1, max_size=20).filter(lambda t: t != "???" and "${" not in t),
    "seed": st.integers(0, 2**62),
    "federation.clients": st.integers(40, 10**6),
    "federation.rounds": st.integers(20, 10**6),
    "federation.dropout": st.floats(0, 1, exclude_max=True),
    "federation.weighting": st.sampled_from(["examples", "uniform"]),
    "training.lr": st.floats(min_value=1e-300, max_value=1e300),
    "training.momentum": st.floats(0, 1, exclude_max=True),
    "training.local_steps": st.none() | st.integers(1, 1000),
    "training.augment": st.booleans(),
    "training.warm_start": st.none() | st.just(__file__),
    "engine.workers": st.just("auto") | st.integers(1, 64),
    "engine.gpus_per_worker": st.none() | st.floats(0, 8),
    "attack": st.sampled_from(
        [None, "none", "pgd", {"name": "anticipate", "k": 2}, {"name": "neurotoxin", "craft": ["scale", "project"]}]
    ),
    "defense": st.sampled_from(
        [
            None,
            "krum",
            [{"name": "norm_clipping", "bound": 1e-5}, "rfa"],
            {"name": "flower", "strategy": "FedTrimmedAvg", "arguments": {"beta": 0.1}},
        ]
    ),
    "task.data": st.sampled_from(["digits", "hub", {"name": "mnist5k", "test_fraction": 0.5}]),
    "federation.partition": st.sampled_from(["iid", {"name": "dirichlet", "alpha": 1e-3}, "pathological"]),
}


@settings(max_examples=30)
@given(st.fixed_dictionaries({}, optional=SCALARS))
def test_a_config_written_and_read_again_is_the_same(tmp_path, values):
    config = load_config({}, values)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(file) == config
    assert load_config(config.to_dict()) == config


@pytest.mark.parametrize(
    "text",
    [
        "1e-3",
        "0123",
        "1:30",
        "+1",
        ".5",
        "yes",
        "null",
        "~",
        "",
        " ",
        "a: b",
        "# no",
        "- x",
        "'",
        "2020-01-01",
        "hé",
        "\n",
    ],
)
def test_text_that_looks_like_something_else_is_kept(tmp_path, text):
    config = load_config({"name": text})
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert config.name == text == load_config(tmp_path / "config.yaml").name


def test_an_escaped_interpolation_stays_one(tmp_path):
    config = load_config({"name": "\\${seed}"})
    assert config.name == "${seed}"
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


# ------------------------------------------------------------------------------ nothing but ConfigError

SEED: dict[str, Any] = {
    "name": "x",
    "seed": 1,
    "plugins": [],
    "task": {
        "name": "vision",
        "data": {"name": "parquet", "path": ".", "train": "*.parquet", "shape": [1, 2, 2]},
        "model": {"name": "cnn", "channels": 4},
        "train_examples": 100,
    },
    "federation": {
        "clients": 9,
        "clients_per_round": 4,
        "rounds": 30,
        "partition": {"name": "dirichlet", "alpha": 0.5},
        "dropout": 0.1,
    },
    "training": {"lr": 0.1, "local_steps": None, "augment": True, "warm_start": None},
    "attack": {
        "name": "anticipate",
        "k": 2,
        "trigger": {"name": "blended", "image": None, "alpha": 0.1},
        "schedule": {"name": "random_rounds", "count": 3, "start": 2, "stop": 9},
        "craft": ["scale", {"name": "project", "bound": 2.0}],
    },
    "defense": [
        {"name": "norm_clipping", "bound": 1.0},
        {"name": "flower", "strategy": "Krum", "arguments": {"num_malicious_nodes": 1}},
    ],
    "engine": {"name": "ray", "workers": 2},
}

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 12),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["???", "${", "${seed}", "~nobody", "x" * 5000, "\0", "**", "/", "", "none", "krum", "semantic"]),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=4) | st.integers(), st.integers() | st.text(max_size=3), max_size=2),
    st.sampled_from([{"name": name} for name in ("edge_case", "semantic", "hub", "bulyan", "flower", "pool", "rfa")]),
    st.sampled_from([b"bytes", object, {1, 2}, (1, 2), 1j]),
)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A config that is right, changed in a few places."""
    raw = copy.deepcopy(SEED)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(paths(raw) or [("seed",)]))
        holder: Any = raw
        for key in place[:-1]:
            holder = holder[key]
        change = draw(st.sampled_from(["delete", "rename", "set", "add"]))
        if change == "set" or isinstance(holder, list):
            holder[place[-1]] = draw(ODD)
        elif change == "add":
            holder[draw(st.text(max_size=5) | st.sampled_from(["name", "f", "path", "rounds"]))] = draw(ODD)
        elif place[-1] in holder:
            value = holder.pop(place[-1])
            if change == "rename":
                holder[f"{place[-1]}s"] = value
    return raw


@settings(max_examples=100)
@given(mutated())
def test_a_wrong_config_is_a_config_error_and_nothing_else(raw):
    with contextlib.suppress(ConfigError):
        config = load_config(raw)
        assert load_config(config.to_dict()) == config


@settings(max_examples=60)
@given(
    st.lists(
        st.builds(
            "{}={}".format,
            st.sampled_from([".".join(map(str, place)) for place in paths(SEED)]) | st.text(max_size=10),
            ODD.map(str),
        ),
        max_size=3,
    )
)
def test_a_wrong_command_line_is_a_config_error_and_nothing_else(overrides):
    with contextlib.suppress(ConfigError):
        load_config(SEED, overrides)


@settings(max_examples=100)
@given(st.text(alphabet="abk:[]{}-#'\"&*!|>%@`\t\n ,?${}0.", max_size=40))
def test_any_text_is_a_config_or_a_config_error(tmp_path, text):
    file = tmp_path / "any.yaml"
    file.write_text(text, encoding="utf-8")
    with contextlib.suppress(ConfigError):
        load_config(file)


# ------------------------------------------------------------------------------- defaults of every plugin


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_every_default_is_allowed_and_documented(kind):
    import dataclasses

    for name in plugins.names(kind):
        for field in dataclasses.fields(plugins.get(kind, name).Parameters):
            assert field.metadata.get("doc"), f"{kind} {name}: {field.name} says nothing"
            if field.default is not dataclasses.MISSING:
                assert plugins.range_problem(field, field.default) is None
                assert not isinstance(field.default, float) or math.isfinite(field.default)
