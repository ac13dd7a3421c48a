"""Everything a user can get wrong, played by the command line: one clear message, a status, nothing left half done."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedsim.errors import InputError
from fedsim.experiment import Run
from fedsim.federation import grids
from tests.support.runs import contents, differing

pytestmark = pytest.mark.usefixtures("own_registry")

PLUGIN = '''
import torch
from fedsim.attack import Attack
from fedsim.plugins import register

@register("saboteur")
class Saboteur(Attack):
    """Sends what cannot be used."""

    def craft(self, update, context):
        {body}
'''


@pytest.fixture
def write(tmp_path: Path, tiny: dict[str, Any]) -> Callable[..., Path]:
    """A function writing the tiny config with changes, sections merged."""

    def put(**changes: Any) -> Path:
        for section, value in changes.items():
            tiny[section] = {**tiny[section], **value} if isinstance(value, dict) and section in tiny else value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tiny))
        return path

    return put


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., Path]:
    """A function writing a directory of 8×8 images; ``bad`` replaces the bytes of one row."""

    def make(count: int = 80, bad: bytes | None = None, **columns: Any) -> Path:
        root = tmp_path / "images"
        root.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for part in ("train", "test"):
            rows: list[Any] = [rng.integers(0, 256, 64, dtype=np.uint8).tobytes() for _ in range(count)]
            image: Any = pa.array(rows, pa.binary(64))
            if bad is not None:
                image = pa.array([*rows[:5], bad, *rows[6:]], pa.binary())
            table = {"image": image, "label": [i % 4 for i in range(count)], **columns}
            pq.write_table(pa.table(table), root / f"{part}.parquet")
        return root

    return make


def leaves_nothing(out: Path) -> bool:
    return not out.exists()


# -------------------------------------------------------------------------------- before anything is begun


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: [\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "duplicate key"),
        ("\ttask: 1\n", "not valid YAML"),
        ("- a\n", "a config is a mapping"),
        ("trainning: {lr: 0.1}\n", "did you mean 'training'"),
        ("training: {lr: fast}\n", "training.lr: expected a number, got 'fast'"),
        ("defaults: nowhere\n", "nowhere: no such file"),
    ],
)
def test_wrong_yaml(cli, tmp_path, text, said):
    (tmp_path / "c.yaml").write_text(text)
    done = cli("run", tmp_path / "c.yaml", "--out", tmp_path / "run")
    assert done.status == 2
    assert said in done.text
    assert leaves_nothing(tmp_path / "run")


def test_a_missing_data_directory(cli, tmp_path, write):
    config = write(task={"data": {"name": "parquet", "path": str(tmp_path / "nowhere")}})
    done = cli("run", config, "--out", tmp_path / "run")
    assert done.status == 2
    assert f"task.data.path: there is no directory '{tmp_path / 'nowhere'}'" in done.text
    assert leaves_nothing(tmp_path / "run")


@pytest.mark.parametrize("bad", [b"no image", b"\x89PNG\r\n\x1a\n", b""])
def test_an_unreadable_image(cli, tmp_path, write, images, bad):
    config = write(task={"data": {"name": "parquet", "path": str(images(bad=bad))}})
    done = cli("run", config, "--out", tmp_path / "run")
    assert done.status == 2
    assert "train.parquet, row" in done.text
    assert "the image cannot be decoded" in done.text
    assert leaves_nothing(tmp_path / "run")


@pytest.mark.parametrize(
    ("partition", "clients", "said"),
    [
        ({"name": "iid"}, 81, "80 examples cannot be split over 81 clients"),
        ({"name": "dirichlet", "alpha": 1e-5}, 60, "cannot split 80 examples over 60 clients"),
        ({"name": "natural"}, 8, "needs an owner for every example"),
        ({"name": "pathological", "classes_per_client": 5}, 8, "number of unique classes"),
    ],
)
def test_clients_without_examples(cli, tmp_path, write, images, partition, clients, said):
    config = write(
        task={"data": {"name": "parquet", "path": str(images())}, "test_examples": None},
        federation={"partition": partition, "clients": clients},
        attack=None,
    )
    done = cli("run", config, "--out", tmp_path / "run")
    assert done.status == 2
    assert said in done.text
    assert leaves_nothing(tmp_path / "run")


def test_too_few_training_examples_for_the_clients(cli, tmp_path, write):
    done = cli("run", write(), "task.train_examples=5", "federation.partition=iid", "--out", tmp_path / "run")
    assert done.status == 2
    assert "5 examples cannot be split over 8 clients" in done.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["task.model=vgg9"], "model 'vgg9' takes images of at least 32×32; the data's images are 8×8"),
        (["task.model=lenet5"], "model 'lenet5' takes images of 28×28 or 32×32"),
        (["attack.trigger=pixel_pattern"], "pixel_pattern"),
        (["attack.trigger.target=10"], "target 10, but there are 10 classes; use a target in 0–9"),
        (["attack.trigger.size=9"], "patch"),
    ],
)
def test_a_model_or_trigger_that_does_not_fit_the_data(cli, tmp_path, write, options, said):
    done = cli("run", write(), *options, "--out", tmp_path / "run")
    assert done.status == 2
    assert said in done.text
    assert leaves_nothing(tmp_path / "run")


def test_a_gpu_that_is_not_there(cli, tmp_path, write, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = cli("run", write(engine={"device": "cuda"}), "--out", tmp_path / "run")
    assert done.status == 2
    assert "engine.device: cuda is asked for, but torch sees no GPU" in done.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import not_there\n", "ModuleNotFoundError: No module named 'not_there'"),
        ("x = (\n", "SyntaxError"),
        ("raise ValueError('no')\n", "ValueError: no"),
    ],
)
def test_a_plugin_that_fails_to_import(cli, tmp_path, write, text, said):
    (tmp_path / "mine.py").write_text(text)
    done = cli("run", write(plugins=[str(tmp_path / "mine.py")]), "--out", tmp_path / "run")
    assert done.status == 2
    assert f"plugins: {tmp_path / 'mine.py'} fails to import: {said}" in done.text
    assert leaves_nothing(tmp_path / "run")


@pytest.mark.slow
def test_a_strangers_attacks_package_stops_a_run_before_it_begins(tmp_path, write):
    """The names attacks and defenses are generic: a working directory may well hold another."""
    (tmp_path / "attacks").mkdir()
    (tmp_path / "attacks" / "__init__.py").write_text("x = 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "fedsim", "run", str(write()), "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    message = " ".join(done.stderr.split())
    assert done.returncode == 2, message
    assert f"'attacks' found at {tmp_path / 'attacks' / '__init__.py'} is not fedsim's" in message
    assert "Traceback" not in message
    assert leaves_nothing(tmp_path / "run")


# ------------------------------------------------------------------------------------------ within a round


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_update_that_is_not_finite_is_rejected_and_the_round_goes_on(cli, tmp_path, write, value):
    (tmp_path / "mine.py").write_text(PLUGIN.format(body=f"u = update.clone(); u[3] = float('{value}'); return u"))
    config = write(plugins=[str(tmp_path / "mine.py")], attack={"name": "saboteur", "craft": []})
    done = cli("run", config, "--out", tmp_path / "run")
    assert done.status == 0
    clients = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    rejected = clients[clients["status"] == "rejected"]
    assert rejected["round"].tolist() == [3, 4]
    assert rejected["malicious"].all()
    assert rejected["reason"].str.contains("not finite").all()
    assert rejected["update_norm"].isna().all()
    assert (rejected["weight"] == 0).all()
    assert not rejected["accepted"].any()
    for row in rejected.itertuples():
        assert f"round {row.round}: client {row.client} rejected: an update that is not finite" in done.text
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet")
    assert rounds["malicious_submitted"].tolist() == [0, 0, 1, 1, 0, 0]
    assert rounds["malicious_accepted"].sum() == 0
    assert rounds["main_accuracy"].iloc[-1] > 0.6
    others = clients[clients["round"].isin([3, 4]) & (clients["status"] == "ok")]
    assert others.groupby("round")["weight"].sum().tolist() == pytest.approx([1, 1])


def test_all_rejected_keeps_the_model(cli, tmp_path, write):
    (tmp_path / "mine.py").write_text(PLUGIN.format(body="return update * float('nan')"))
    config = write(
        plugins=[str(tmp_path / "mine.py")],
        attack={"name": "saboteur", "craft": [], "schedule": {"name": "continuous", "start": 3, "attackers": 4}},
    )
    assert cli("run", config, "--out", tmp_path / "run").status == 0
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet")
    assert rounds["main_accuracy"].iloc[1:].nunique() == 1
    assert rounds["main_loss"].iloc[1:].nunique() == 1
    assert rounds["main_accuracy"].iloc[0] != rounds["main_accuracy"].iloc[1]


def arrays(vector: Any) -> ArrayRecord:
    return ArrayRecord({"model": Array(np.asarray(vector))})


REPLIES: dict[str, tuple[Callable[[RecordDict], Any], str]] = {
    "shorter": (lambda r: r.__setitem__("arrays", arrays(np.zeros(7, np.float32))), "shape (7,), the model has (650,)"),
    "a matrix": (lambda r: r.__setitem__("arrays", arrays(np.zeros((650, 1), np.float32))), "shape (650, 1)"),
    "whole numbers": (lambda r: r.__setitem__("arrays", arrays(np.zeros(650, np.int64))), "the array holds int64"),
    "no arrays": (lambda r: r.__delitem__("arrays"), "unusable reply"),
    "another name": (
        lambda r: r.__setitem__("arrays", ArrayRecord({"weights": Array(np.zeros(650, np.float32))})),
        "expected one array named 'model'",
    ),
    "no metrics": (lambda r: r.__delitem__("metrics"), "unusable reply"),
    "no examples": (lambda r: r["metrics"].__setitem__("num-examples", 0), "a number of examples of 0"),
    "half an example": (lambda r: r["metrics"].__setitem__("num-examples", 0.5), "a number of examples of 0.5"),
}


@pytest.mark.parametrize("kind", REPLIES)
def test_a_reply_that_cannot_be_used_is_rejected_and_the_round_goes_on(cli, tmp_path, write, monkeypatch, kind):
    spoil, said = REPLIES[kind]
    call = grids.call
    spoilt: list[int] = []

    def spoiling(app: Any, message: Message, nodes: int) -> Message:
        reply, order = call(app, message, nodes), message.content.config_records["config"]
        if order["round"] == 2 and not spoilt:
            spoilt.append(int(order["client"]))
            spoil(reply.content)
        return reply

    monkeypatch.setattr(grids, "call", spoiling)
    done = cli("run", write(attack=None), "--out", tmp_path / "run")
    assert done.status == 0, done.text
    assert f"round 2: client {spoilt[0]} rejected: " in done.text
    clients = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    rejected = clients[clients["status"] != "ok"]
    assert rejected[["round", "client", "status"]].values.tolist() == [[2, spoilt[0], "rejected"]]
    assert said in rejected["reason"].iloc[0]
    assert clients.groupby("round")["weight"].sum().tolist() == pytest.approx([1.0] * 6)
    assert len(pd.read_parquet(tmp_path / "run" / "rounds.parquet")) == 6


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return update[:-1]", "attack 'saboteur' made an update of shape"),
        ("return update.reshape(-1, 1)", "attack 'saboteur' made an update of shape"),
        ("raise KeyError('my mistake')", "my mistake"),
        ("raise MemoryError('no more of it')", "no more of it"),
    ],
)
def test_an_attack_that_does_not_keep_to_the_interface_ends_the_run(cli, tmp_path, write, body, said):
    (tmp_path / "mine.py").write_text(PLUGIN.format(body=body))
    config = write(plugins=[str(tmp_path / "mine.py")], attack={"name": "saboteur", "craft": []})
    done = cli("run", config, "--out", tmp_path / "run")
    assert done.status == 1
    assert "round 3, client" in done.text
    assert said in done.text
    assert pd.read_parquet(tmp_path / "run" / "rounds.parquet")["round"].tolist() == [1, 2]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert "round 3, client" in manifest["reason"]


def test_a_defense_that_is_left_too_few_clients_by_rejections(cli, tmp_path, write):
    (tmp_path / "mine.py").write_text(PLUGIN.format(body="return update * float('nan')"))
    config = write(
        plugins=[str(tmp_path / "mine.py")],
        attack={"name": "saboteur", "craft": [], "schedule": {"name": "continuous", "start": 3, "attackers": 2}},
        defense="krum",
    )
    done = cli("run", config, "--out", tmp_path / "run")
    assert done.status == 0, done.text
    assert "round 3: the defense 'krum' needs at least 3 clients, 2 are left" in done.text
    assert "the model stays" in done.text
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet")
    assert rounds["round"].tolist() == [1, 2, 3, 4, 5, 6]
    assert rounds["main_loss"].iloc[1] == rounds["main_loss"].iloc[2]
    clients = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    third = clients[clients["round"] == 3]
    assert not third["accepted"].any()
    assert set(third["reason"]) >= {"too few clients for the defense"}


@pytest.mark.parametrize(("lr", "status"), [(1e8, "ok"), (1e37, "rejected"), (3e38, "rejected")])
def test_training_that_diverges_is_recorded_and_does_not_crash(cli, tmp_path, write, lr, status):
    config = write(training={"lr": lr}, output={"report": False, "tensorboard": True})
    done = cli("run", config, "--out", tmp_path / "run", "--twin")
    assert done.status == 0, done.text
    clients = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    assert (clients["status"] == status).any()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["final"]["round"] == 6


# --------------------------------------------------------------------------------------------------- disk


class FullDisk:
    """``os.replace`` on a disk that is full from the ``after``-th file of that name on."""

    def __init__(self, name: str, after: int) -> None:
        self.name, self.left, self.replace = name, after, os.replace

    def __call__(self, source: Any, target: Any) -> None:
        if Path(target).name == self.name:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.replace(source, target)


@pytest.mark.parametrize(
    ("name", "after", "played"),
    [
        ("config.yaml", 0, None),
        ("rounds.parquet", 3, [1, 2, 3]),
        ("clients.parquet", 3, None),
        ("round-000004.json", 0, [1, 2, 3, 4]),
        ("model.safetensors", 0, [1, 2, 3, 4, 5, 6]),
        ("summary.json", 0, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_a_full_disk_ends_the_run_and_it_can_be_resumed(
    cli, tmp_path, write, monkeypatch, finished, name, after, played
):
    """Ended with status 1 and a message; what is there is whole; with room again, the same bytes."""
    config = write(output={"checkpoint_every": 2})
    with monkeypatch.context() as patch:
        patch.setattr("fedsim.recording.files.os.replace", FullDisk(name, after))
        done = cli("run", config, "--out", tmp_path / "run")
    assert done.status == 1
    assert f"the disk is full: {name} could not be written" in done.text
    assert "--resume" in done.text
    assert not list((tmp_path / "run").rglob("*.tmp"))
    if played is not None:
        assert pd.read_parquet(tmp_path / "run" / "rounds.parquet")["round"].tolist() == played
    if name == "config.yaml":
        return
    again = cli("run", config, "--out", tmp_path / "run", "--resume")
    assert again.status == 0, again.text
    assert differing(tmp_path / "run", contents(finished.directory)) == []


def test_a_disk_that_is_full_when_a_round_is_noted(cli, tmp_path, write, monkeypatch, finished):
    """The journal is appended to, not replaced."""
    config = write(output={"checkpoint_every": 2})
    fsync, calls = os.fsync, iter(range(10**6))

    def full(descriptor: int) -> None:
        if "journal" in os.readlink(f"/proc/self/fd/{descriptor}") and next(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("fedsim.recording.tables.os.fsync", full)
        done = cli("run", config, "--out", tmp_path / "run")
    assert done.status == 1
    assert "the disk is full: journal.jsonl could not be written" in done.text
    assert cli("run", config, "--out", tmp_path / "run", "--resume").status == 0
    assert differing(tmp_path / "run", contents(finished.directory)) == []


def test_a_directory_nobody_may_write_in(cli, tmp_path, write):
    done = cli("run", write(), "--out", "/proc/fedsim/run")
    assert done.status == 1
    assert "/proc/fedsim/run could not be written" in done.text


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path, write):
    """A file system of two hundred kilobytes, where one may be mounted."""
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "fedsim",
                "run",
                str(write(federation={"rounds": 400})),
                "--out",
                str(mount / "run"),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 1
        assert "the disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        rounds = pd.read_parquet(mount / "run" / "rounds.parquet")
        assert rounds["round"].tolist() == list(range(1, len(rounds) + 1))
    finally:
        subprocess.run(["umount", str(mount)], check=False)


# ------------------------------------------------------------------------------------ damaged run directories


def interrupted(cli: Callable[..., Any], config: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a run that ended after four rounds, with checkpoints after the second and the fourth."""
    with monkeypatch.context() as patch:
        patch.setattr("fedsim.recording.files.os.replace", FullDisk("rounds.parquet", 4))
        assert cli("run", config, "--out", out).status == 1


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(cli, tmp_path, write, monkeypatch, finished):
    config, out = write(output={"checkpoint_every": 2}), tmp_path / "run"
    interrupted(cli, config, out, monkeypatch)
    newest = out / "checkpoints" / "round-000004.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[-1] ^= 1
    newest.write_bytes(raw)
    done = cli("run", config, "--out", out, "--resume")
    assert done.status == 0
    assert "round-000004 is damaged" in done.text
    assert "continuing after round 2" in done.text
    assert differing(out, contents(finished.directory)) == []


def test_all_checkpoints_damaged_starts_from_the_beginning(cli, tmp_path, write, monkeypatch, finished):
    config, out = write(output={"checkpoint_every": 2}), tmp_path / "run"
    interrupted(cli, config, out, monkeypatch)
    for path in (out / "checkpoints").glob("*.json"):
        path.write_text("{")
    done = cli("run", config, "--out", out, "--resume")
    assert done.status == 0
    assert differing(out, contents(finished.directory)) == []


def test_a_damaged_journal_is_refused(cli, tmp_path, write, monkeypatch):
    config, out = write(output={"checkpoint_every": 2}), tmp_path / "run"
    interrupted(cli, config, out, monkeypatch)
    lines = (out / "journal.jsonl").read_text().splitlines()
    (out / "journal.jsonl").write_text("\n".join([lines[0][:-5], *lines[1:]]) + "\n")
    done = cli("run", config, "--out", out, "--resume")
    assert done.status == 2
    assert "journal.jsonl is damaged in line 1" in done.text


def test_a_damaged_config_of_a_run(cli, tmp_path, write, monkeypatch):
    config, out = write(output={"checkpoint_every": 2}), tmp_path / "run"
    interrupted(cli, config, out, monkeypatch)
    (out / "config.yaml").write_text("task: [")
    done = cli("run", config, "--out", out, "--resume")
    assert done.status == 2
    assert "not valid YAML" in done.text


def test_a_directory_in_use(cli, tmp_path, write):
    out = tmp_path / "run"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = cli("run", write(), "--out", out)
    assert done.status == 2
    assert "another run is at work" in done.text
    assert (out / ".lock").exists()


def test_a_directory_without_a_finished_run(tmp_path):
    with pytest.raises(InputError, match=r"holds no finished run \(no summary.json\)"):
        Run.open(tmp_path)
