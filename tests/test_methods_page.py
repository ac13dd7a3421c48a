"""docs/methods.md: a row for every method, none of them stale, and measured differences that were measured."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from fedsim import plugins
from fedsim.defense import Defense
from tests.support.places import ROOT, script


@pytest.fixture(scope="module")
def methods() -> ModuleType:
    return script("benchmarks/methods.py")


def test_every_method_has_a_row(methods: ModuleType) -> None:
    wrong = methods.problems(methods.read())
    assert not wrong, "\n".join(wrong)


def test_every_method_says_what_it_costs(methods: ModuleType) -> None:
    lacking = [f"{cls.kind} {cls.name}" for cls in methods.registered() if cls.kind != "trigger" and not cls.cost]
    assert not lacking, f"set the class attribute cost of {', '.join(lacking)}"


def test_the_page_is_as_the_code_and_the_rows_are(methods: ModuleType) -> None:
    assert methods.PAGE.read_text(encoding="utf-8") == methods.page(), "run python benchmarks/methods.py --write"


def test_the_page_has_one_line_for_a_method_with_what_the_code_says(methods: ModuleType) -> None:
    parts = dict(zip(methods.KINDS, methods.page().split("\n## ")[1:], strict=True))
    rows = {}
    for cls in methods.registered():
        found = [line for line in parts[cls.kind].splitlines() if line.startswith(f"| `{cls.name}` |")]
        assert len(found) == 1, cls.name
        rows[cls.name] = found[0].replace("\\|", "").split(" | ")
        assert len(rows[cls.name]) == 7, cls.name
        assert cls.paper in found[0]
        assert cls.cost.replace("``", "`") in found[0]
    assert rows["multi_krum"][2:4] == ["3 clients or more", "O(N² D) time, O(N²) memory"]
    assert rows["multi_krum"][4].startswith("flwr 1.41, ")
    assert rows["multi_krum"][6] == "the copy in Multi-metrics keeps nine rows whatever n is |"
    assert rows["ipm"][2] == "own data, updates of benign clients"
    assert rows["dba"][2] == "vision; 4 parts"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows["defense"].pop("krum"), "defense krum has no row .* under defense: write krum: {agrees"),
        (lambda rows: rows["attack"].update(krum={}), "attack krum has a row but is no method"),
        (lambda rows: rows["attack"]["pgd"].pop("agrees"), "attack pgd: say agrees"),
        (lambda rows: rows["attack"]["pgd"].update(agree=1), "attack pgd: agree is no key; use agrees, tests"),
        (lambda rows: rows["attack"]["pgd"].pop("measured"), "run python benchmarks/methods.py --measure pgd"),
        (lambda rows: rows["attack"]["pgd"].update(tests=["tests/none.py::test_pgd"]), "no test tests/none.py"),
        (
            lambda rows: rows["attack"]["pgd"].update(tests=["tests/attacks/test_parity.py::test_pg"]),
            "there is no test tests/attacks/test_parity.py::test_pg$",
        ),
    ],
)
def test_a_row_that_is_wrong_is_told_with_what_to_write(methods: ModuleType, change: Any, said: str) -> None:
    import re

    rows = copy.deepcopy(methods.read())
    change(rows)
    new = set(methods.problems(rows)) - set(methods.problems(methods.read()))
    assert any(re.search(said, problem) for problem in new), new


def test_a_plugin_of_somebody_else_needs_no_row(methods: ModuleType, own_registry: None) -> None:
    before = methods.problems(methods.read())
    plugins.register("theirs")(type("Theirs", (Defense,), {"__module__": "their_package"}))
    assert methods.problems(methods.read()) == before


# --------------------------------------------------------------------------------------------- measuring

CHECKS = """
import pytest, torch

def assert_near(found, expected, tolerance):
    assert (found - torch.tensor(expected)).abs().max() <= tolerance * 10

def off(found, expected):
    return float((found - expected).abs().max())

def test_near():
    assert_near(torch.tensor([1.0, 20.0]).double(), [1.5, 21.0], 0.125)
    assert_near(torch.tensor([1.0]).double(), [1.25], 0.125)

def test_others():
    assert off(torch.tensor(1.0), torch.tensor(1.0625)) <= 1e-1
    assert 1.5 == pytest.approx(1.25, abs=0.5)
    assert 1.0 == pytest.approx(1.0)
    torch.testing.assert_close(torch.tensor(4.0), torch.tensor(5.0), rtol=0, atol=2.0)
    assert torch.allclose(torch.tensor(0.0), torch.tensor(0.5), rtol=0, atol=1.0)
    assert not torch.allclose(torch.tensor(0.0), torch.tensor(9.0), rtol=0, atol=1.0)

@pytest.mark.parametrize("name", ["one", "two"])
def test_of_two(name):
    assert_near(torch.tensor([0.0]), [0.5 if name == "one" else 0.0], 1.0)

def test_that_skips():
    pytest.skip("no numbers here")
"""


@pytest.mark.slow
def test_differences_are_those_of_the_tests(tmp_path: Path) -> None:
    """In a process of its own, as the script runs pytest."""
    (tmp_path / "test_checks.py").write_text(CHECKS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    program = f"""
import runpy, pathlib, pytest
module = runpy.run_path({str(ROOT / "benchmarks" / "methods.py")!r})
seen = module["Differences"]()
with seen.watching():
    pytest.main(["-q", "-p", "no:cacheprovider", "test_checks.py"], plugins=[seen])
print("FOUND", {{key.split("::")[1]: value for key, value in seen.found.items()}}, len(seen.failed))
measure = module["measure"]
measure.__globals__["ROOT"] = pathlib.Path.cwd()
rows = {{"attack": {{"a": {{"tests": ["test_checks.py::test_of_two[two]"]}}}}, "defense": {{}}}}
measure(rows)
print("ROWS", rows["attack"]["a"]["measured"])
for tests in (["test_checks.py::test_that_skips"], ["test_checks.py::test_of_none"]):
    try:
        measure({{"attack": {{"a": {{"tests": tests}}}}}})
    except SystemExit as error:
        print("SAID", str(error).replace(chr(10), " "))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found, rows, skipped, none = (
        line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith(("FOUND", "ROWS", "SAID"))
    )
    assert (
        found
        == str(
            {
                "test_near": {0.125: 0.3333333333333333},  # relative to 1.5; 1 of 21 is less
                "test_others": {0.1: 0.0625, 0.5: 0.2, 2.0: 0.2, 1.0: 0.5},
                "test_of_two[one]": {1.0: 0.5},
                "test_of_two[two]": {1.0: 0.0},
                "test_that_skips": {},
            }
        )
        + " 1"
    )
    assert rows == "statistical"
    assert "no numbers here" in skipped
    assert "test_of_none" in none


def test_differences_in_words(methods: ModuleType) -> None:
    assert methods.told({1e-9: 4.4e-16, 1e-12: 0.0}) == "0 (1e-12), 4e-16 (1e-09)"
    assert methods.told({0.0: 0.0}) == methods.told({}) == "exact"
    assert methods.told({0.01: 3e-3}) == "statistical"
    assert methods.told({0.01: 3e-3, 1e-6: 2e-7}) == "2e-07 (1e-06)"


def test_which_cases_are_meant(methods: ModuleType) -> None:
    assert methods.matches("a.py::test_x", "a.py::test_x")
    assert methods.matches("a.py::test_x", "a.py::test_x[min_max-1]")
    assert methods.matches("a.py::test_x[min_max]", "a.py::test_x[1-min_max]")
    assert not methods.matches("a.py::test_x[min_max]", "a.py::test_x[min_sum]")
    assert not methods.matches("a.py::test_x", "a.py::test_xy")


def test_saving_keeps_every_word(methods: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = methods.read()
    monkeypatch.setattr(methods, "PARITY", tmp_path / "parity.yaml")
    methods.save(rows)
    assert yaml.safe_load((tmp_path / "parity.yaml").read_text(encoding="utf-8")) == rows
    once = (tmp_path / "parity.yaml").read_bytes()
    methods.save(methods.read())
    assert (tmp_path / "parity.yaml").read_bytes() == once


def test_differences_are_relative_above_one(methods: ModuleType) -> None:
    seen = methods.Differences()
    seen.compare({"a": torch.tensor([10.0, 1.0]), "b": 0.5}, {"a": [8.0, 1.0], "b": 0.25}, 1.0)
    seen.compare(torch.empty(0), [], 2.0)
    assert seen.found == {"": {1.0: 0.25}}


# ------------------------------------------------------------------------- what the command line says of them


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("what", ["attacks", "defenses", "triggers"])
def test_lists_say_what_a_method_needs_and_costs(
    cli: Any, monkeypatch: pytest.MonkeyPatch, methods: ModuleType, what: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = cli("list", what)
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(done.out.split())
    for cls in methods.registered():
        if f"{cls.kind}s" == what:
            said = [cls.summary(), cls.paper, cls.cost]
            said += (
                [methods.knowledge(cls)] if what == "attacks" else [methods.needs(cls)] if what == "defenses" else []
            )
            assert all(" ".join(part.split()) in text for part in said), cls.name
    column = lines[0].index("what it is")
    assert all(not line[:column].strip() or line[column - 2 : column] == "  " for line in lines)
    assert sum(bool(line[:column].strip()) for line in lines) == 1 + len(plugins.names(what[:-1]))


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("attack", "ipm", ["knows: own data, updates of benign clients", "backdoor: no", "cost: an honest round; at"]),
        ("attack", "neurotoxin", ["knows: data of benign clients, own data; by its parameters also the last"]),
        ("attack", "rare_embedding", ["tasks: next_word, sentiment", "backdoor: yes", "paper: Yoo, Kwak"]),
        (
            "defense",
            "krum",
            ["needs: 3 clients or more", "own aggregation rule: no", "cost: O(N² D) time, O(N²) memory"],
        ),
        ("defense", "rfa", ["needs: the updates only", "own aggregation rule: yes"]),
        ("defense", "flower", ["needs: the updates only"]),
    ],
)
def test_descriptions_say_what_a_method_needs_and_costs(cli: Any, kind: str, name: str, said: list[str]) -> None:
    out = cli("describe", kind, name).out
    assert all(any(line.startswith(part) for line in out.splitlines()) for part in said), out


class Demanding(Defense):
    """Wants everything."""

    min_clients = 4
    needs_data = True

    def client_update(self, update: Any, context: Any) -> Any:
        return update


def test_needs_of_a_defense_that_wants_everything(methods: ModuleType) -> None:
    wanted = "4 clients or more, the network at the server, data at the server, honest clients that take part in it"
    assert methods.needs(Demanding) == wanted


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("attack", "dba", "no attack is called 'dba'; it is a trigger: write attack.trigger: dba (there are: alie"),
        ("trigger", "krum", "no trigger is called 'krum'; it is a defense: write defense: [krum] (there are"),
        ("defense", "pgd", "it is an attack: write attack.name: pgd"),
        ("attack", "project", "it is a craft: write attack.craft: [project]"),
        ("dataset", "iid", "it is a partition: write federation.partition: iid"),
        ("attack", "kurm", "no attack is called 'kurm' (there are"),
        ("defense", "kurm", "no defense is called 'kurm'; did you mean 'krum'? (there are"),
    ],
)
def test_a_name_of_another_kind_says_where_it_belongs(kind: str, name: str, said: str) -> None:
    assert said in plugins.unknown(kind, name)


def test_what_it_says_to_write_is_taken() -> None:
    from fedsim.config import load_config

    for kind in plugins.KINDS:
        text = plugins._WRITTEN[kind]
        assert text.count("{}") == 1
    for kind, name in (("trigger", "patch"), ("defense", "krum"), ("craft", "scale"), ("partition", "iid")):
        text = plugins.unknown("task", name).split("write ")[1].split(" (there")[0]
        assert text == plugins._WRITTEN[kind].format(name)
        key, value = text.split(": ", 1)
        load_config({"attack": {"name": "data_poisoning"}}, [f"{key}={value}"])
