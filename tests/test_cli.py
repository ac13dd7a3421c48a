"""The command line and whole runs by it: what is printed, what is written, how it ends."""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import yaml
from rich.console import Console

from fedsim import plugins
from fedsim.batch import Examples
from fedsim.cli.describing import LISTS
from fedsim.cli.display import display
from fedsim.config import Config, config_directory, load_config, render_base
from fedsim.data import Data
from fedsim.errors import RunError
from fedsim.experiment import Run, Silent, run
from fedsim.federation.client import initial_module
from fedsim.federation.evaluation import Measurement
from fedsim.federation.records import ClientRecord, RoundRecord
from fedsim.layout import Layout
from fedsim.report import words
from fedsim.streams import numpy_generator
from tests.support.runs import SUMMARY_KEYS, TABLES, contents

COMMANDS = ("run", "validate", "list", "describe", "report", "bench", "compare")


@pytest.fixture
def wordy_file(tmp_path: Path) -> Path:
    """A config of a next-word run that takes a moment: twelve users each repeat a sentence of their own."""
    sentences = [f"the {thing} from {place} is good" for thing in ("food", "wine") for place in "abcdef"]
    (tmp_path / "texts").mkdir()
    table = pd.DataFrame({"text": sentences * 8, "user": list(range(12)) * 8})
    table.to_parquet(tmp_path / "texts" / "train.parquet")
    config = {
        "name": "wordy",
        "task": {
            "name": "next_word",
            "data": {"name": "text_parquet", "path": str(tmp_path / "texts"), "test": None, "user": "user"},
            "model": {"name": "lstm_lm", "embedding": 8, "hidden": 8, "layers": 1},
            "window": 6,
            "specials": ["awful"],
        },
        "federation": {"clients": 6, "clients_per_round": 3, "rounds": 4, "partition": "natural"},
        "training": {"lr": 1.0, "momentum": 0.0, "local_epochs": 1, "batch_size": 4},
        "attack": {
            "name": "data_poisoning",
            "trigger": {
                "name": "target_sentence",
                "prompts": ["the food from a is"],
                "test_prompts": ["the wine from b is"],
                "targets": ["awful"],
            },
            "schedule": {"name": "continuous", "start": 3, "stop": 4},
        },
        "engine": {"name": "serial"},
        "output": {"report": False, "checkpoint_every": 2},
    }
    path = tmp_path / "wordy.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def cut_test(data: Data, config: Config) -> Examples:
    """The test examples a run uses: as many as task.test_examples, of the stream of that name."""
    rows = numpy_generator(config.seed, "limit", "test").permutation(len(data.test))[: config.task.test_examples]
    return data.test.subset(torch.from_numpy(rows).sort().values)


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """``python -m fedsim`` as a user runs it."""
    command = [sys.executable, "-m", "fedsim", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


# ------------------------------------------------------------------------------------- what there is to see


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_every_command(cli, command, flag):
    done = cli(*command, flag)
    assert done.status == 0
    assert "Usage" in done.out
    if not command:
        assert all(name in done.out for name in COMMANDS)


def test_no_command_shows_the_help(cli):
    done = cli()
    assert done.status == 2
    assert "Usage" in done.text


@pytest.mark.parametrize(
    "arguments",
    [("rnu", "quickstart"), ("run",), ("validate",), ("report",), ("run", "base", "--frobnicate"), ("describe",)],
)
def test_wrong_usage_is_said_in_a_line(cli, arguments):
    done = cli(*arguments)
    assert done.status == 2
    assert "Traceback" not in done.text
    assert "Usage" in done.err


@pytest.mark.parametrize("what", LISTS)
def test_lists_name_every_plugin_and_what_it_is(cli, what):
    done = cli("list", what)
    assert done.status == 0
    kind = LISTS[what]
    for name in plugins.names(kind):
        assert name in done.out
        assert plugins.get(kind, name).summary().split()[0] in done.out


def test_lists_of_everything_and_of_the_configs(cli):
    done = cli("list")
    assert done.status == 0
    assert all(name in done.out for kind in plugins.KINDS for name in plugins.names(kind))
    assert {"base", "quickstart"} <= set(cli("list", "configs").out.split())
    unknown = cli("list", "attackz")
    assert unknown.status == 2
    assert "attacks, defenses" in unknown.text


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in plugins.KINDS for name in plugins.names(kind)])
def test_every_plugin_is_described(cli, kind, name):
    import dataclasses

    done = cli("describe", kind, name)
    assert done.status == 0, done.err
    cls = plugins.get(kind, name)
    assert f"{kind} {name}" in done.text
    assert " ".join(cls.summary().split()[:4]) in done.text
    assert " ".join(cls.paper.split()) in done.text
    for field in dataclasses.fields(cls.Parameters):
        assert field.name in done.text
        assert all(word in done.text for word in field.metadata["doc"].split())
    if kind == "attack":
        assert "knows: " in done.text


def test_long_defaults_leave_room_for_what_they_mean(cli):
    lines = cli("describe", "trigger", "target_sentence").out.splitlines()
    field = plugins.get("trigger", "target_sentence").Parameters.__dataclass_fields__["test_prompts"]
    row = next(line for line in lines if line.startswith("test_prompts "))
    assert str(field.default_factory())[:10] in row
    assert " ".join(field.metadata["doc"].split()[:3]) in row
    assert len(str(field.default_factory())) > 50
    assert max(map(len, lines[lines.index(row) :])) <= 80


def test_defaults_are_shown_as_a_config_has_them(cli):
    lines = {line.split(" = ")[0].strip(): line for line in cli("describe", "config").out.splitlines() if " = " in line}
    for key, value in (
        ("seed", "0"),
        ("training.lr_decay", "1.0"),
        ("federation.dropout", "0.0"),
        ("training.augment", "false"),
        ("training.local_steps", "null"),
        ("training.local_epochs", "2"),
        ("federation.weighting", "examples"),
        ("plugins", "[]"),
    ):
        assert f"{key} = {value}   " in lines[key]
    assert "in [0, 1)" in lines["federation.dropout"]
    assert "fedsim list triggers" in lines["attack.trigger"]


def test_the_base_config_is_printed_as_it_is_shipped(cli):
    assert cli("describe", "base").out == render_base()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("describe", "atack", "pgd"), "there is no kind 'atack'"),
        (("describe", "attack", "pdg"), "did you mean 'pgd'"),
        (("describe", "attack"), "name one: alie"),
        (("describe", "attacks", "nothing"), "no attack is called 'nothing'"),
    ],
)
def test_descriptions_that_are_not_there(cli, arguments, said):
    done = cli(*arguments)
    assert done.status == 2
    assert said in done.text


# ------------------------------------------------------------------------------------------------ validate


def test_validate_says_ok_for_each(cli, tiny_file):
    done = cli("validate", "quickstart", "base", tiny_file)
    assert done.status == 0
    assert done.out.split() == ["quickstart:", "ok", "base:", "ok", f"{tiny_file}:", "ok"]


def test_validate_reports_all_problems_of_all_files(cli, tmp_path, tiny_file):
    (tmp_path / "one.yaml").write_text("seed: -1\ntrainning: {}\n")
    (tmp_path / "two.yaml").write_text("federation: {clients: 3}\n")
    done = cli("validate", tmp_path / "one.yaml", tiny_file, tmp_path / "two.yaml", "nowhere")
    assert done.status == 2
    assert f"2 problems in {tmp_path / 'one.yaml'}" in done.err
    assert "trainning: unknown key; did you mean 'training'?" in done.err
    assert "federation.clients_per_round: 10 cannot be sampled from 3" in done.err
    assert "nowhere: no such file" in done.err
    assert f"{tiny_file}: ok" in done.out


def test_validate_looks_at_the_plan_too(cli, tmp_path, tiny):
    tiny["federation"]["dropout"] = 0.6
    tiny["defense"] = "krum"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny))
    done = cli("validate", tmp_path / "c.yaml")
    assert done.status == 2
    assert "defense.0.name: 'krum' needs at least 3 clients" in done.text


def test_validate_takes_benchmarks_too(cli, tmp_path, tiny_file):
    files = sorted(config_directory().glob("bench/*.yaml"))
    assert len(files) == 4
    done = cli("validate", *files, "quick", "quickstart")
    assert done.status == 0, done.err
    assert done.out.count(": ok") == 6
    grid = {"base": str(tiny_file), "grid": {"defense": ["krum", "kurm"], "training.lr": [-1.0]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    done = cli("validate", tmp_path / "grid.yaml")
    assert done.status == 2
    assert "no defense is called 'kurm'; did you mean 'krum'?" in done.text
    assert "training.lr" in done.text
    done = cli("run", tmp_path / "grid.yaml", "--out", tmp_path / "run")
    assert done.status == 2
    assert "play it with fedsim bench" in done.text
    assert not (tmp_path / "run").exists()


def test_validate_tells_a_missing_file_from_a_wrong_config(cli, tmp_path):
    (tmp_path / "c.yaml").write_text("task: {data: {name: parquet, path: /nowhere/at/all}}\n")
    done = cli("validate", tmp_path / "c.yaml")
    assert done.status == 0
    assert "this machine lacks a file (task.data.path: there is no directory '/nowhere/at/all'" in done.text
    assert cli("run", tmp_path / "c.yaml").status == 2
    (tmp_path / "c.yaml").write_text("seed: -1\ntask: {data: {name: parquet, path: /nowhere/at/all}}\n")
    done = cli("validate", tmp_path / "c.yaml")
    assert done.status == 2
    assert "2 problems" in done.text


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_run_prints_and_writes(cli, tiny_file, tmp_path):
    done = cli("run", tiny_file, "--out", tmp_path / "run", "--twin", "output.report=true")
    assert done.status == 0, done.err
    assert done.out.startswith(f"run directory: {tmp_path / 'run'}\nattack: 6 rounds to play\n")
    assert "clean twin: 6 rounds to play" in done.out
    assert "round 6/6" in done.out
    assert f"report: {tmp_path / 'run' / 'report.html'}" in done.out
    assert done.err == ""
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "config.yaml",
        "manifest.json",
        "summary.json",
        "timings.parquet",
        "twin",
        "report.html",
        *TABLES,
    } <= written
    assert ".lock" not in written
    assert "journal.jsonl" not in written
    page = (tmp_path / "run" / "report.html").read_bytes()
    (tmp_path / "run" / "report.html").unlink()
    again = cli("report", tmp_path / "run")
    assert again.status == 0
    assert str(tmp_path / "run" / "report.html") in again.out
    assert (tmp_path / "run" / "report.html").read_bytes() == page


def test_a_run_goes_under_the_output_directory_by_its_name_and_seed(cli, tiny_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("run", tiny_file, "federation.rounds=4", "seed=7", "name=mine").status == 0
    assert cli("run", tiny_file, "federation.rounds=4", "seed=7", "name=mine").status == 0
    found = sorted((tmp_path / "runs" / "mine").iterdir())
    assert len(found) == 2
    assert all("-seed7" in path.name for path in found)


def test_the_backdoor_rises_under_attack_and_stays_at_the_floor_in_the_twin(finished):
    asr, twin = finished.rounds.set_index("round")["asr"], finished.twin.set_index("round")["asr"]
    assert asr[3] > 0.8
    assert asr[4] > 0.8
    assert asr[[1, 2]].max() < 0.2
    assert twin.max() < 0.2
    assert finished.rounds["main_accuracy"].iloc[-1] > 0.6
    assert finished.rounds["main_accuracy"].iloc[:2].equals(finished.twin["main_accuracy"].iloc[:2])


def test_the_rounds_table(finished):
    rounds = finished.rounds
    assert list(rounds) == [
        "round",
        "main_accuracy",
        "main_loss",
        "perplexity",
        "class_accuracy",
        "asr",
        "asr_examples",
        "malicious_submitted",
        "malicious_accepted",
        "defense",
    ]
    assert rounds["perplexity"].isna().all()
    assert [len(row) for row in rounds["class_accuracy"]] == [10] * 6
    assert rounds["round"].tolist() == [1, 2, 3, 4, 5, 6]
    assert rounds["malicious_submitted"].tolist() == [0, 0, 1, 1, 0, 0]
    assert rounds["malicious_accepted"].tolist() == [0, 0, 1, 1, 0, 0]
    assert finished.twin["malicious_submitted"].sum() == 0
    assert rounds["main_accuracy"].between(0, 1).all()
    assert (rounds["main_loss"] > 0).all()
    config = load_config(finished.directory / "config.yaml")
    assert config.attack is not None
    data = config.task.data.create().load()
    manifest = json.loads((finished.directory / "manifest.json").read_text())
    assert manifest["examples"]["train"] == len(data.train)
    assert manifest["examples"]["test"] == 200
    test = cut_test(data, config)
    by_class = dict(enumerate(rounds["class_accuracy"].iloc[-1]))
    right = sum(by_class[label] for label in test.labels.tolist())
    assert right / len(test) == pytest.approx(rounds["main_accuracy"].iloc[-1])
    others = int((test.labels != config.attack.trigger.parameters.target).sum())
    assert (rounds["asr_examples"] == others).all()
    assert manifest["examples"]["triggered_test"] == others
    hits = rounds["asr"] * others
    assert (abs(hits - hits.round()) < 1e-6).all()


def test_the_clients_table(finished):
    clients = finished.clients
    assert list(clients)[:9] == [
        "round",
        "client",
        "malicious",
        "examples",
        "update_norm",
        "accepted",
        "weight",
        "status",
        "reason",
    ]
    assert clients.groupby("round").size().tolist() == [4] * 6
    assert clients.groupby("round")["weight"].sum().tolist() == pytest.approx([1.0] * 6)
    share = clients["examples"] / clients.groupby("round")["examples"].transform("sum")
    assert clients["weight"].tolist() == pytest.approx(share.tolist())
    assert (clients["update_norm"] > 0).all()
    assert (clients["status"] == "ok").all()
    assert clients["accepted"].all()
    manifest = json.loads((finished.directory / "manifest.json").read_text())
    malicious = clients[clients["malicious"]]
    by_round = {str(r): sorted(group["client"]) for r, group in malicious.groupby("round")}
    assert manifest["adversary"] == {"rounds": 2, "first": 3, "last": 4, "malicious_clients_by_round": by_round}
    attacked = clients[clients["round"].isin([3, 4])]
    norms = attacked.groupby(["round", "malicious"])["update_norm"].max().unstack()
    assert (norms[True] > norms[False]).all(), "the boosted update is the largest"


def test_the_manifest_says_what_ran(finished):
    manifest = json.loads((finished.directory / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["seed"] == 0
    assert manifest["methods"]["task"] == {"name": "vision", "class": "fedsim.tasks.vision.Vision", "parameters": {}}
    assert manifest["methods"]["attack"]["class"] == "attacks.data_poisoning.DataPoisoning"
    assert manifest["methods"]["attack"]["craft"][0]["name"] == "scale"
    assert manifest["partition"]["clients"] == 8
    assert manifest["partition"]["examples"] == manifest["examples"]["train"]
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["data"]["licence"] == "CC BY 4.0"
    assert str(Path.home()) not in json.dumps(manifest), "a manifest can be published"


def test_the_summary(finished):
    summary = json.loads((finished.directory / "summary.json").read_text())
    assert summary == finished.summary
    assert set(summary) == SUMMARY_KEYS
    assert summary["t0"] == 4
    assert summary["floor"] == "clean twin"
    assert summary["time_to_inject"]["0.75"] == 1
    assert set(summary["lifespan"]) == {"0.25", "0.5", "0.75"}
    assert summary["final"]["round"] == 6
    assert summary["final"]["asr"] == finished.rounds["asr"].iloc[-1]
    assert summary["final"]["perplexity"] is None
    assert summary["final"]["class_accuracy"] == finished.rounds["class_accuracy"].iloc[-1].tolist()
    assert Run.open(finished.directory).rounds.equals(finished.rounds)


def test_the_model_is_the_one_measured_last(finished):
    config = load_config(finished.directory / "config.yaml")
    data = config.task.data.create().load()
    test = cut_test(data, config)
    module = initial_module(config, data)
    saved = safetensors.torch.load_file(finished.directory / "model.safetensors")
    assert set(saved) == {entry.name for entry in Layout.of(module).entries}
    modes = {name: (finished.directory / name).stat().st_mode for name in TABLES}
    assert len(set(modes.values())) == 1, "the model is as readable as the tables"
    module.load_state_dict(saved, strict=False)
    with torch.no_grad():
        right = module(test.inputs.float() / 255).argmax(1) == test.labels
    assert float(right.double().mean()) == finished.rounds["main_accuracy"].iloc[-1]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(cli, tiny_file, tmp_path, finished):
    assert cli("run", tiny_file, "--out", tmp_path / "again").status == 0
    assert contents(tmp_path / "again") == contents(finished.directory)
    assert cli("run", tiny_file, "--out", tmp_path / "other", "seed=1").status == 0
    other = contents(tmp_path / "other")
    assert all(other[name] != content for name, content in contents(finished.directory).items())


def test_what_a_result_does_not_depend_on(cli, tiny_file, tmp_path, finished):
    """Its name, the size of evaluation batches, how often it is saved."""
    options = ["name=x", "output.checkpoint_every=1", "evaluation.batch_size=7", "output.tensorboard=true"]
    assert cli("run", tiny_file, "--out", tmp_path / "run", *options).status == 0
    made = contents(tmp_path / "run")
    assert made["model.safetensors"] == contents(finished.directory)["model.safetensors"]
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet")
    assert rounds.drop(columns="main_loss").equals(finished.rounds.drop(columns="main_loss"))
    assert rounds["main_loss"].tolist() == pytest.approx(finished.rounds["main_loss"].tolist(), rel=1e-6)


def test_evaluation_every_few_rounds_and_the_last(cli, tiny_file, tmp_path, finished):
    assert cli("run", tiny_file, "--out", tmp_path / "run", "evaluation.every=4").status == 0
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet").set_index("round")
    full = finished.rounds.set_index("round")
    for column in ("main_accuracy", "main_loss", "asr", "asr_examples"):
        assert rounds[column].notna().tolist() == [False, False, False, True, False, True]
        assert rounds[column][[4, 6]].tolist() == full[column][[4, 6]].tolist()
    assert rounds["malicious_submitted"].equals(full["malicious_submitted"])


def test_a_warm_start(cli, tiny_file, tmp_path, finished):
    model = finished.directory / "model.safetensors"
    options = [f"training.warm_start={model}", "federation.rounds=1", "attack=null", "training.lr=1e-30"]
    assert cli("run", tiny_file, "--out", tmp_path / "run", *options).status == 0
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet")
    assert rounds["main_accuracy"][0] == finished.rounds["main_accuracy"].iloc[-1]
    assert rounds["asr"].isna().all()
    for path, said in (
        (tmp_path / "nothing.safetensors", "training.warm_start: no such file"),
        (tiny_file, "cannot be read"),
        (model, "does not fit the model"),
    ):
        wrong = ["task.model=cnn"] if path == model else []
        done = cli("run", tiny_file, "--out", tmp_path / "wrong", f"training.warm_start={path}", *wrong)
        assert done.status == 2
        assert said in done.text
        assert not (tmp_path / "wrong").exists(), "nothing is left of a run that never began"


def test_no_adversary(cli, tiny_file, tmp_path):
    assert cli("run", tiny_file, "--out", tmp_path / "null", "attack=null", "--twin").status == 0
    assert cli("run", tiny_file, "--out", tmp_path / "none", "attack.name=none").status == 0
    null, none = (pd.read_parquet(tmp_path / name / "rounds.parquet") for name in ("null", "none"))
    assert null["asr"].isna().all()
    assert none["asr"].notna().all()
    assert null["main_accuracy"].equals(none["main_accuracy"])
    assert json.loads((tmp_path / "null" / "summary.json").read_text())["t0"] is None


def test_scores_of_a_defense_are_in_the_table(cli, tiny_file, tmp_path):
    options = ["defense=[norm_clipping, {name: multi_krum, f: 1}]", "federation.rounds=4"]
    assert cli("run", tiny_file, "--out", tmp_path / "run", *options).status == 0
    clients = pq.read_table(tmp_path / "run" / "clients.parquet").to_pylist()
    assert {name for row in clients for name, _ in row["scores"]} >= {"norm_clipping.norm", "multi_krum.score"}
    assert all(row["weight"] == 0 for row in clients if not row["accepted"])
    assert not all(row["accepted"] for row in clients)


def test_drop_out_is_in_the_table(cli, tiny_file, tmp_path):
    options = ["federation.dropout=0.5", "federation.stragglers=0.5"]
    assert cli("run", tiny_file, "--out", tmp_path / "run", *options).status == 0
    clients = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    assert set(clients["status"]) == {"ok", "dropped", "straggler"}
    lost = clients[clients["status"] != "ok"]
    assert lost["update_norm"].isna().all()
    assert not lost["accepted"].any()
    assert (lost["weight"] == 0).all()


# ----------------------------------------------------------------------------------- where a run may be put


def test_out_directories_that_cannot_be_used(cli, tiny_file, tmp_path, finished):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for arguments, said in (
        (["--resume"], "--resume needs --out DIR"),
        (["--out", tmp_path / "file"], "is a file; give a directory"),
        (["--out", tmp_path / "full"], "is not empty; give another --out, or continue the run there with --resume"),
        (["--out", tmp_path / "full", "--resume"], "holds files, but no run"),
        (["--out", finished.directory], "is not empty"),
        (["--out", "/proc/nothing/run"], "could not be written"),
    ):
        done = cli("run", tiny_file, *arguments)
        assert done.status in (1, 2)
        assert said in done.text
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    assert (tmp_path / "file").read_text() == "x"


def test_resuming_another_configs_run_names_the_keys(cli, tiny_file, tmp_path, finished):
    before = contents(finished.directory)
    done = cli("run", tiny_file, "--out", finished.directory, "--resume", "training.lr=0.1", "attack.trigger.size=2")
    assert done.status == 2
    assert "these keys differ: attack.trigger.size, training.lr" in done.text
    assert contents(finished.directory) == before


def test_resuming_a_finished_run_leaves_it_as_it_is(cli, tiny_file, finished):
    before = contents(finished.directory)
    done = cli("run", tiny_file, "--out", finished.directory, "--resume", "--twin", "engine.retries=7")
    assert done.status == 0
    assert "this run is complete" in done.out
    assert contents(finished.directory) == before


def test_resuming_where_there_is_nothing_starts_anew(cli, tiny_file, tmp_path, finished):
    assert cli("run", tiny_file, "--out", tmp_path / "new", "--resume").status == 0
    assert contents(tmp_path / "new") == contents(finished.directory)


def test_a_twin_can_be_played_later(cli, tiny_file, tmp_path, finished):
    assert cli("run", tiny_file, "--out", tmp_path / "run").status == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["floor"] == "assumed 0"
    done = cli("run", tiny_file, "--out", tmp_path / "run", "--resume", "--twin")
    assert done.status == 0
    assert contents(tmp_path / "run") == contents(finished.directory)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == finished.summary
    twin = "twin/rounds.parquet"
    assert (tmp_path / "run" / twin).read_bytes() == (finished.directory / twin).read_bytes()


def test_a_next_word_run_counts_words(cli, wordy_file, tmp_path):
    done = cli("run", wordy_file, "--out", tmp_path / "run", "output.report=true")
    assert done.status == 0, done.err
    played = Run.open(tmp_path / "run")
    rounds = played.rounds
    assert rounds["perplexity"].tolist() == pytest.approx([math.exp(loss) for loss in rounds["main_loss"]])
    assert rounds["class_accuracy"].isna().all(), "classes are words, and many"
    final = words.perplexity(rounds["perplexity"].iloc[-1])
    assert f"final perplexity {final}" in done.text
    assert re.search(rf"round 4/4 main +[\d.]+% ppl +{re.escape(final)} ASR", done.text)
    assert played.summary["final"]["perplexity"] == rounds["perplexity"].iloc[-1]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["methods"]["task"]["class"] == "fedsim.tasks.text.NextWord"
    assert manifest["methods"]["task"]["parameters"]["window"] == 6
    page = played.report.read_text()
    assert "top-1 next word" in page
    assert html.escape(words.baseline(manifest["data"])) in page


def test_an_interrupted_next_word_run_continues_to_the_same_bytes(cli, wordy_file, tmp_path):
    class Impatient(Silent):
        def round(self, record: RoundRecord) -> None:
            if record.round == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(load_config(wordy_file), out=tmp_path / "run", progress=Impatient())
    resumed = cli("run", wordy_file, "--out", tmp_path / "run", "--resume")
    assert resumed.status == 0, resumed.err
    assert "continuing after round 2" in resumed.out
    assert cli("run", wordy_file, "--out", tmp_path / "whole").status == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_run_of_an_older_version_opens_and_is_reported(cli, tmp_path, finished):
    shutil.copytree(finished.directory, tmp_path / "run")
    for table in ("rounds.parquet", "twin/rounds.parquet"):
        rounds = pd.read_parquet(tmp_path / "run" / table)
        rounds.drop(columns=["perplexity", "class_accuracy"]).to_parquet(tmp_path / "run" / table)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    del summary["final"]["perplexity"], summary["final"]["class_accuracy"]
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    opened = Run.open(tmp_path / "run")
    assert "class_accuracy" not in opened.rounds
    assert opened.summary["final"]["round"] == 6
    again = cli("run", tmp_path / "run" / "config.yaml", "--out", tmp_path / "run", "--resume")
    assert again.status == 0
    assert "this run is complete" in again.out
    assert "final main accuracy" in again.text
    assert cli("report", tmp_path / "run").status == 0
    assert "target of the backdoor" not in (tmp_path / "run" / "report.html").read_text()


def test_reports_of_what_is_no_run(cli, tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        done = cli("report", path)
        assert done.status == 2, done.text
        assert str(path) in done.text


# -------------------------------------------------------------------------------------------- how it ends


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "continue with the same command and --out DIR --resume"),
        (MemoryError(), 1, "out of memory"),
        (RunError("the disk is full"), 1, "the disk is full"),
    ],
)
def test_errors_become_a_status_and_a_message(cli, tiny_file, tmp_path, monkeypatch, error, status, said):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fedsim.experiment.play", fail)
    done = cli("run", tiny_file, "--out", tmp_path / "run")
    assert done.status == status
    assert said in done.text


def test_a_mistake_of_ours_is_not_hidden(cli, tiny_file, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise Stop

    monkeypatch.setattr("fedsim.experiment.play", fail)
    with pytest.raises(Stop):
        cli("run", tiny_file, "--out", tmp_path / "run")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RunError("it failed")])
def test_tables_are_written_when_a_long_run_ends_early(tmp_path, tiny, monkeypatch, error):
    """Long runs rewrite their tables now and then only."""
    monkeypatch.setattr("fedsim.recording.tables._ROWS_PER_REWRITE", 1)

    class Impatient(Silent):
        def round(self, record: RoundRecord) -> None:
            if record.round == 5:
                assert not (tmp_path / "run" / "rounds.parquet").exists()
                raise error

    tiny["federation"]["rounds"] = 20
    with pytest.raises(type(error)):
        run(load_config(tiny), out=tmp_path / "run", progress=Impatient())
    assert pd.read_parquet(tmp_path / "run" / "rounds.parquet")["round"].tolist() == [1, 2, 3, 4, 5]
    assert len(pd.read_parquet(tmp_path / "run" / "clients.parquet")) == 20


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_bytes(cli, tiny_file, tmp_path):
    """Ctrl-C: status 130, tables whole, and --resume ends where an uninterrupted run does."""
    options = ["federation.rounds=120", "output.checkpoint_every=7", "attack.schedule.stop=90"]
    directory = tmp_path / "run"
    running = subprocess.Popen(
        [
            *("env", "--default-signal=INT"),  # a shell that runs the suite in the background has it ignored
            *(sys.executable, "-m", "fedsim", "run", str(tiny_file), "--out", str(directory), *options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    journal = directory / "journal.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and running.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= 20:
            break
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, out + err
    assert "--resume" in err
    assert "Traceback" not in err
    played = pd.read_parquet(directory / "rounds.parquet")["round"].tolist()
    assert played == list(range(1, len(played) + 1))
    assert 20 <= len(played) < 120
    assert set(pd.read_parquet(directory / "clients.parquet")["round"]) == set(played)
    assert json.loads((directory / "manifest.json").read_text())["status"] == "interrupted"
    assert not (directory / "summary.json").exists()
    again = cli("run", tiny_file, *options, "--out", directory)
    assert again.status == 2
    assert "--resume" in again.text
    resumed = cli("run", tiny_file, *options, "--out", directory, "--resume")
    assert resumed.status == 0
    # Ctrl-C may come between a round's row and its checkpoint: then it is the one before.
    assert any(f"continuing after round {last // 7 * 7}\n" in resumed.out for last in (len(played), len(played) - 1))
    assert cli("run", tiny_file, *options, "--out", tmp_path / "whole").status == 0
    assert contents(directory) == contents(tmp_path / "whole")
    numbers = [json.loads((d / "summary.json").read_text()) for d in (directory, tmp_path / "whole")]
    assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_the_module_is_the_command(tmp_path, tiny):
    """One process each of: done, run failed, bad input; side by side, for most of their time they import."""
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(yaml.safe_dump(tiny))
    bad.write_text("trainning: {}\n")
    (tmp_path / "mine.py").write_text(
        "from fedsim.attack import Attack\nfrom fedsim.plugins import register\n\n"
        "@register('mine')\nclass Mine(Attack):\n    '''Fails.'''\n\n"
        "    def train(self, context):\n        raise ValueError('my own mistake')\n"
    )
    commands = [
        ("run", good, "--out", "run"),
        ("run", good, "--out", "failed", "plugins=[mine.py]", "attack=mine"),
        ("run", bad),
    ]
    with ThreadPoolExecutor() as threads:
        done, failed, wrong = threads.map(lambda command: process(*command, cwd=tmp_path), commands)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "summary.json").exists()
    assert failed.returncode == 1
    assert "my own mistake" in failed.stderr
    assert "round 3, client" in failed.stderr
    assert wrong.returncode == 2
    assert "did you mean 'training'" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------------------------------- the display


def record(
    number: int, *, measured: bool = True, malicious: bool = False, perplexity: float | None = None
) -> RoundRecord:
    measurement = Measurement(0.9, 0.3, 0.25, 100, perplexity) if measured else None
    return RoundRecord(number, [ClientRecord(1, malicious, 10)], measurement)


def test_a_terminal_gets_a_live_display(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    with display(console, load_config({})) as progress:
        progress.begin("attack", 3, 1)
        progress.say("something [odd]")
        progress.client()
        progress.round(record(2, malicious=True))
        progress.round(record(3, measured=False))
    text = screen.getvalue()
    assert "something [odd]" in text
    assert "3/3" in text


def test_a_log_gets_lines(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, width=160)
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr("fedsim.cli.display.time.monotonic", lambda: float(next(clock)))
    with display(console, load_config({})) as progress:
        progress.begin("attack", 100, 0)
        for number in range(1, 101):
            progress.client()
            progress.round(record(number, malicious=number == 50))
    lines = screen.getvalue().splitlines()
    assert lines[0] == "attack: 100 rounds to play"
    assert len(lines) == 51, "one line about every five seconds"
    assert "main  90.0%  ASR  25.0%  attack" in screen.getvalue()
    assert lines[-1].startswith("round 100/100")
    assert "0:00 left" in lines[-1]


@pytest.mark.parametrize("what", ["attack", "clean twin"])
@pytest.mark.parametrize("perplexity", [None, 348.3, 2e7])
def test_a_terminal_of_eighty_columns_has_room_for_all_of_it(monkeypatch, what, perplexity):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with display(console, load_config({})) as progress:
        progress.begin(what, 2000, 0)
        progress.round(record(1200, malicious=True, perplexity=perplexity))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    line = re.split(r"[\r\n]+", text.strip())[-1]
    shown = "" if perplexity is None else f"  ppl {words.perplexity(perplexity)}"
    assert f"1200/2000 main  90.0%{shown}  ASR  25.0%  attack " in line
    assert line.rstrip().endswith(":-- left")
    assert "…" not in line


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.9, "1:01"), (3600, "1:00:00"), (7325, "2:02:05")])
def test_the_clock(seconds, text):
    assert words.clock(seconds) == text


@pytest.mark.parametrize(
    ("command", "argument"),
    [("run", "A YAML file, or the name"), ("report", "directories that hold"), ("list", "attacks, defenses, triggers")],
)
def test_the_help_says_what_the_arguments_are(cli, command, argument):
    """Click 8.5 sets back what typer has put there."""
    text = " ".join(re.sub(r"[│\s]+", " ", cli(command, "--help").out).split())
    assert argument in text.partition("Arguments")[2].partition("Options")[0]


def test_the_help_keeps_examples_and_fills_paragraphs(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = [line.rstrip() for line in cli("bench", "--help").out.splitlines()]
    assert "   fedsim bench quick --dry-run" in lines
    assert "     defense:                     # LABEL: value" in lines
    start = next(i for i, line in enumerate(lines) if "Stopped or killed" in line)
    assert all(len(line) > 80 for line in lines[start : start + 3]), "no line ends early"
