"""The registry: what may enter it, what it says when it cannot give what is asked for."""

from __future__ import annotations

import importlib.metadata
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedsim import plugins
from fedsim.attack import Attack
from fedsim.config import load_config
from fedsim.errors import ConfigError, PluginError
from fedsim.plugins import Parameters, Plugin, allowed, parameter, range_problem, register

GOOD = '''
from dataclasses import dataclass
from fedsim.attack import Attack
from fedsim.plugins import Parameters, parameter, register

@dataclass(frozen=True)
class MyParameters(Parameters):
    strength: float = parameter(0.5, "how hard", ge=0, le=1)

@register("{name}")
class Mine(Attack):
    """An attack of my own."""
    Parameters = MyParameters

    def craft(self, update, context):
        return update * self.parameters.strength
'''


pytestmark = pytest.mark.usefixtures("own_registry")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def put(text: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return put


# ---------------------------------------------------------------------------------------- names and kinds


def test_every_kind_has_plugins_that_describe_themselves():
    for kind in plugins.KINDS:
        assert plugins.names(kind) == sorted(plugins.names(kind))
        assert plugins.names(kind)
        for name in plugins.names(kind):
            cls = plugins.get(kind, name)
            assert (cls.kind, cls.name) == (kind, name)
            assert cls.summary(), f"{kind} {name} has no docstring"
            assert cls.summary().isprintable()
            assert issubclass(cls.Parameters, Parameters)
            assert name == name.lower()


def test_methods_of_the_literature_name_their_paper():
    for kind in ("attack", "defense", "trigger"):
        for name in plugins.names(kind):
            assert plugins.get(kind, name).paper, f"{kind} {name}"


def test_unknown_names_say_what_there_is():
    with pytest.raises(
        PluginError, match=r"no attack is called 'anticpate'; did you mean 'anticipate'\? \(there are: .*pgd"
    ):
        plugins.get("attack", "anticpate")
    with pytest.raises(PluginError, match=r"no schedule is called 'xyz' \(there are: continuous, fixed_frequency"):
        plugins.get("schedule", "xyz")


def test_two_of_one_name_are_refused_and_both_are_named():
    class Other(Attack):
        pass

    with pytest.raises(PluginError, match=r"two attack plugins are called 'pgd': attacks\.pgd\.\w+ and .*Other"):
        register("pgd")(Other)
    assert plugins.get("attack", "pgd") is not Other
    register("other")(Other)
    assert plugins.get("attack", "other") is Other
    assert register("other")(Other) is Other  # the same class again, as a reload does


def test_one_name_in_two_kinds_is_fine():
    class Mine(Attack):
        pass

    register("krum")(Mine)
    assert plugins.get("attack", "krum") is Mine
    assert plugins.get("defense", "krum") is not Mine


def test_a_class_without_an_interface_is_refused():
    with pytest.raises(PluginError, match="derive it from one of fedsim's interfaces"):
        register("thing")(type("Thing", (Plugin,), {}))


# --------------------------------------------------------------------------------------------- parameters


def test_create_checks_names_and_ranges():
    stage = plugins.create("defense", "norm_clipping", bound=3.0)
    assert stage.parameters.bound == 3.0
    with pytest.raises(PluginError, match=r"defense 'norm_clipping' has no parameter 'bond'; it has: bound, scope"):
        plugins.create("defense", "norm_clipping", bond=3.0)
    with pytest.raises(PluginError, match=r"bound: 0 is out of range; use a finite number > 0"):
        plugins.create("defense", "norm_clipping", bound=0)
    with pytest.raises(PluginError, match="use one of all, trainable"):
        plugins.create("defense", "norm_clipping", scope="some")
    with pytest.raises(PluginError, match="it has: none"):
        plugins.create("partition", "iid", alpha=1)


def test_parameters_are_frozen_and_lists_are_not_shared():
    one, two = plugins.get("schedule", "single_shot").Parameters(), plugins.get("schedule", "single_shot").Parameters()
    assert one == two
    assert one.rounds is not two.rounds  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        one.rounds = [3]  # type: ignore[attr-defined]


RULES = st.fixed_dictionaries(
    {},
    optional={"ge": st.integers(-5, 5), "gt": st.integers(-5, 5), "le": st.integers(-5, 5), "lt": st.integers(-5, 5)},
)


@example({}, 2**63)
@example({}, 2**63 - 1)
@example({}, float("inf"))
@example({"ge": 0}, float("nan"))
@given(RULES, st.floats() | st.integers(-7, 7) | st.integers(-(2**70), 2**70))
def test_a_range_is_what_its_rules_say(rules, value):
    field = make_field(**rules)
    tests = {"ge": value >= rules.get("ge", 0), "gt": value > rules.get("gt", 0)}
    tests |= {"le": value <= rules.get("le", 0), "lt": value < rules.get("lt", 0)}
    inside = abs(value) < (2**63 if isinstance(value, int) else math.inf) and all(tests[rule] for rule in rules)
    assert (range_problem(field, value) is None) == inside
    assert (range_problem(field, [0, value] if range_problem(field, 0) is None else [value]) is None) == inside


def make_field(**rules: Any) -> Any:
    @dataclass(frozen=True)
    class Some(Parameters):
        value: Any = parameter(None, "", **rules)

    return fields(Some)[0]


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({}, ""),
        ({"ge": 0}, ">= 0"),
        ({"gt": 0}, "> 0"),
        ({"le": 1}, "<= 1"),
        ({"lt": 1}, "< 1"),
        ({"ge": 0, "le": 1}, "in [0, 1]"),
        ({"gt": 0, "lt": 0.5}, "in (0, 0.5)"),
        ({"choices": ("a", None)}, "one of a, null"),
    ],
)
def test_ranges_in_words(rules, text):
    assert allowed(make_field(**rules)) == text


def test_null_booleans_and_text_have_no_range():
    field = make_field(ge=3)
    assert all(range_problem(field, value) is None for value in (None, True, "x", [], ["x"]))
    assert range_problem(make_field(choices=(1, 2)), 3) is not None


# ----------------------------------------------------------------------------------------- a file of mine


def test_a_file_of_mine_is_found_by_its_name(write):
    path = write(GOOD.format(name="mine"))
    config = load_config({"plugins": [str(path)], "attack": {"name": "mine", "strength": 0.25}})
    assert config.attack is not None
    assert config.attack.parameters.strength == 0.25
    assert config.plugins == [str(path)]
    assert load_config(config.to_dict()) == config  # loading it again changes nothing
    with pytest.raises(ConfigError, match=r"strength: 2\.0 is out of range"):
        load_config({"plugins": [str(path)], "attack": {"name": "mine", "strength": 2}})


def test_a_file_beside_the_config_or_its_parent_is_found(write, tmp_path, monkeypatch):
    write(GOOD.format(name="beside_child"), "configs/child.py")
    write(GOOD.format(name="beside_parent"), "configs/common/parent.py")
    write("plugins: [parent.py]\nattack: beside_parent\n", "configs/common/parent.yaml")
    write("defaults: common/parent.yaml\n", "configs/heir.yaml")
    write("plugins: [child.py]\nattack: beside_child\n", "configs/child.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for file, name in (("child", "beside_child"), ("heir", "beside_parent"), ("common/parent", "beside_parent")):
        config = load_config(Path("..") / "configs" / f"{file}.yaml")
        assert config.attack is not None
        assert config.attack.name == name
        assert load_config(config.to_dict()) == config
    write(GOOD.format(name="in_working_directory"), "elsewhere/child.py")
    del plugins._registry["attack"]["beside_child"]
    with pytest.raises(ConfigError, match="no attack is called 'beside_child'"):
        load_config(tmp_path / "configs" / "child.yaml")
    write(f"plugins: ['{'x' * 5000}', \"a\\0b\"]\n", "configs/odd.yaml")
    with pytest.raises(ConfigError, match=r"no such file|is no path"):
        load_config(tmp_path / "configs" / "odd.yaml")


def test_two_files_of_one_stem_are_two_modules(write):
    one, two = write(GOOD.format(name="one"), "a/mine.py"), write(GOOD.format(name="two"), "b/mine.py")
    plugins.load([str(one), str(two)])
    assert plugins.get("attack", "one") is not plugins.get("attack", "two")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_that_name\n", "ModuleNotFoundError"),
        ("def broken(:\n", "SyntaxError"),
        ("1 / 0\n", "ZeroDivisionError"),
        (GOOD.format(name="pgd"), "two attack plugins are called 'pgd'"),
    ],
)
def test_a_file_that_fails_to_import(write, text, said):
    path = write(text)
    before = set(sys.modules)
    for _ in range(2):  # it is not taken for loaded after the first failure
        with pytest.raises(ConfigError) as caught:
            load_config({"plugins": [str(path)], "seed": 3})
        assert said in str(caught.value)
        assert caught.value.problems[0].path == "plugins"
    if "Error" in said:
        assert set(sys.modules) == before


@pytest.mark.parametrize("name", ["nowhere.py", "", ".", "a\0b", "~nobody_of_that_name/x.py"])
def test_a_file_that_is_not_there(name):
    with pytest.raises(ConfigError, match=r"no such file|is no path"):
        load_config({"plugins": [name]})


def test_a_file_that_is_no_python(write):
    with pytest.raises(ConfigError, match="is not a Python file"):
        load_config({"plugins": [str(write("GOOD", "mine.txt"))]})


# -------------------------------------------------------------------------------- published by a stranger


def _entry_point(monkeypatch: pytest.MonkeyPatch, value: str, load: Callable[[], Any]) -> None:
    point = SimpleNamespace(name="theirs", value=value, load=load)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == "fedsim.attacks" else [])
    plugins._loaded.discard("builtin")


def test_entry_points_are_loaded(monkeypatch):
    def load() -> None:
        register("theirs")(type("Theirs", (Attack,), {"__doc__": "Theirs."}))

    _entry_point(monkeypatch, "their_package:Theirs", load)
    assert "theirs" in plugins.names("attack")


def test_an_entry_point_that_fails_is_named(monkeypatch):
    def load() -> None:
        raise ImportError("no module named torch_geometric")

    _entry_point(monkeypatch, "their_package:Theirs", load)
    with pytest.raises(PluginError, match=r"'theirs' \(their_package:Theirs\) fails to import: no module named torch"):
        plugins.names("attack")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["attacks", "defenses"])
def test_a_strangers_package_is_refused_by_name(tmp_path, package):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "fedsim", "list", "attacks"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    message = " ".join(done.stderr.split())
    assert done.returncode == 2, done.stderr
    assert f"'{package}'" in message
    assert str(tmp_path / package) in message
    assert "PYTHONPATH" in message
    assert "Traceback" not in done.stderr


def test_a_copy_of_ours_elsewhere_is_refused(monkeypatch, tmp_path):
    home = Path(plugins.__file__).parent.parent
    other = tmp_path / "attacks"
    other.mkdir()
    (other / "__init__.py").write_text((home / "attacks" / "__init__.py").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "attacks"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(PluginError, match="is not fedsim's"):
        plugins._import_guarded("attacks")
    monkeypatch.delitem(sys.modules, "attacks", raising=False)
