"""One run, from a config to a run directory."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedsim import plugins
from fedsim.attack import Attack
from fedsim.config import Config, load_config
from fedsim.defense import Defense
from fedsim.errors import ConfigError, InputError, RunError
from fedsim.federation.client import initial_module
from fedsim.federation.engine import choose_device, cores, open_grid
from fedsim.federation.evaluation import Evaluator
from fedsim.federation.grids import LocalGrid
from fedsim.federation.messages import join_state, split_state
from fedsim.federation.records import RoundRecord
from fedsim.federation.schedule import RoundPlan, plan, plan_problems
from fedsim.federation.server import play
from fedsim.federation.server_data import server_maker
from fedsim.federation.setup import prepare
from fedsim.federation.strategy import FederatedStrategy
from fedsim.layout import FlatModel, Layout
from fedsim.local import State
from fedsim.recording import checkpoint, manifest
from fedsim.recording.checkpoint import Checkpoint
from fedsim.recording.directory import TWIN, is_finished, is_played, locked, new_directory
from fedsim.recording.files import write_atomic, write_json, write_text
from fedsim.recording.identity import config_hash, differing
from fedsim.recording.portable import portable
from fedsim.recording.summary import summarise
from fedsim.recording.tables import Tables
from fedsim.report import write_report
from fedsim.tasks.base import Task
from fedsim.tasks.partition import describe


class Progress(Protocol):
    """Who is told how a run is getting on."""

    def begin(self, what: str, rounds: int, done: int) -> None:
        """A run of ``rounds`` rounds starts (``what``: "attack" or "clean twin"), ``done`` of them already played."""

    def say(self, line: str) -> None:
        """Something worth a line."""

    def client(self) -> None:
        """A client has replied."""

    def round(self, record: RoundRecord) -> None:
        """A round is on disk."""


class Silent:
    """No display."""

    def begin(self, what: str, rounds: int, done: int) -> None: ...
    def say(self, line: str) -> None: ...
    def client(self) -> None: ...
    def round(self, record: RoundRecord) -> None: ...


@dataclass(frozen=True)
class Run:
    """A finished run.

    rounds, clients, timings: the tables as data frames. summary: the numbers of ``summary.json``.
    twin: the clean twin's rounds, or None. directory: where everything lies.
    """

    directory: Path
    rounds: pd.DataFrame
    clients: pd.DataFrame
    timings: pd.DataFrame
    summary: dict[str, Any]
    twin: pd.DataFrame | None

    @property
    def report(self) -> Path:
        return self.directory / "report.html"

    @classmethod
    def open(cls, directory: str | Path) -> Run:
        """A run from its directory.

        Raises
        ------
        InputError: there is no finished run.
        """
        root = Path(directory)
        if not (root / "summary.json").is_file():
            raise InputError(f"{root} holds no finished run (no summary.json); run with --out {root} --resume")
        twin = root / TWIN / "rounds.parquet"
        return cls(
            root,
            pd.read_parquet(root / "rounds.parquet"),
            pd.read_parquet(root / "clients.parquet"),
            pd.read_parquet(root / "timings.parquet"),
            json.loads((root / "summary.json").read_text(encoding="utf-8")),
            pd.read_parquet(twin) if twin.is_file() else None,
        )


def run(
    config: Config | str | Path,
    *,
    out: str | Path | None = None,
    twin: bool | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    twin_from: Path | None = None,
    clients_of: Config | None = None,
    threads: int | None = None,
) -> Run:
    """Play an experiment.

    Parameters
    ----------
    config: from :func:`fedsim.load_config`, or what that takes.
    out: the run directory itself; default: ``<output.dir>/<name>/<date-time>-seed<seed>``.
    twin: also play the clean twin; default: ``evaluation.twin``.
    resume: continue what lies in ``out`` (a finished run is returned as it is).
    progress: who is told.
    twin_from: take the clean twin from this finished run without an attack instead of playing it.
    clients_of: meet the clients that this experiment meets, all of them honest: how a clean twin is played as a run of
        its own where attackers have fixed places, or always reply while others drop out.
    threads: that measure the global model, on CPU; default: one a core. No result depends on it; runs side by side
        take their share.

    Raises
    ------
    ConfigError, InputError: something given cannot be used. RunError: the run failed; what is on disk is whole.
    """
    config = config if isinstance(config, Config) else load_config(config)
    rounds = plan(config) if clients_of is None else [replace(r, malicious={}) for r in plan(clients_of)]
    problems = plan_problems(config, rounds)
    if problems:
        raise ConfigError(problems)
    directory = Path(out) if out is not None else new_directory(config)
    progress = progress or Silent()
    with locked(directory, resume), _one_thread():
        progress.say(f"run directory: {directory}")
        with_twin = twin_from is not None or (config.evaluation.twin if twin is None else twin)
        experiment = _Experiment(config, rounds, directory, progress, twin_from, threads or cores())
        return experiment.play(with_twin, resume)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: the numbers are the same on any number of cores, and workers do not fight.

    The caller's number of threads and global random state are as before afterwards.
    """
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


class _Experiment:
    """The parts of one run, built in the order that finds mistakes early."""

    def __init__(
        self,
        config: Config,
        rounds: list[RoundPlan],
        directory: Path,
        progress: Progress,
        twin_from: Path | None,
        threads: int,
    ) -> None:
        self.config, self.plan, self.directory, self.progress = config, rounds, directory, progress
        self.twin_from, self.threads = twin_from, threads
        self.started = time.time()
        self.config_hash = config_hash(config)
        self.device = choose_device(config.engine.device)
        self.workers = 1

    def play(self, with_twin: bool, resume: bool) -> Run:
        if resume and (self.directory / "config.yaml").exists():
            self._check_same_config()
            if is_finished(self.directory, self.config) and (not with_twin or is_played(self.directory / TWIN)):
                self.progress.say("this run is complete")
                return Run.open(self.directory)
        self._prepare()
        write_text(self.directory / "config.yaml", self.config.to_yaml())
        if self.setup.data.vocabulary is not None:
            write_text(self.directory / "vocabulary.json", self.setup.data.vocabulary.to_json())
        self._manifest("running")
        try:
            grid, self.workers = open_grid(
                self.config, self.setup, self.device, say=self.progress.say, on_reply=self.progress.client
            )
            try:
                self._rounds(grid, self.directory, honest=False)
                if with_twin and self.config.attack is not None:
                    (self.directory / TWIN).mkdir(exist_ok=True)
                    if self.twin_from is None:
                        self._rounds(grid, self.directory / TWIN, honest=True)
                    else:
                        self._take_twin(self.twin_from)
            finally:
                grid.close()
                self.evaluator.close()
        except KeyboardInterrupt:
            self._manifest("interrupted")
            raise
        except Exception as error:
            self._manifest("failed", str(error).partition("\n")[0])
            raise
        return self._finish()

    # ------------------------------------------------------------------------------------------- parts

    def _check_same_config(self) -> None:
        """Raises InputError if the directory's run is another one, naming the keys that differ."""
        keys = differing(load_config(self.directory / "config.yaml"), self.config)
        if keys:
            raise InputError(f"{self.directory} holds a run of another config; these keys differ: {', '.join(keys)}")

    def _take_twin(self, source: Path) -> None:
        """Put the tables of a clean twin that was played as a run of its own where this run's own would be.

        Raises
        ------
        InputError: it is not finished, or not this run without its attack.
        """
        if self.evaluator.trigger is not None and self.evaluator.trigger.learnt():
            raise InputError("the floor of a learnt trigger is measured with what it became: play the run's own twin")
        there = load_config(source / "config.yaml")
        keys = [
            key
            for key in differing(there, self.config)
            if not key.startswith("attack.") or key.startswith("attack.trigger.")
        ]
        if there.attack is None or there.attack.name != "none" or keys or not is_played(source):
            raise InputError(f"{source} is not the finished clean twin of this run ({', '.join(keys) or 'its attack'})")
        for name in ("timings.parquet", "clients.parquet", "rounds.parquet"):  # the last one says that it is played
            raw = (source / name).read_bytes()
            write_atomic(self.directory / TWIN / name, lambda path, raw=raw: path.write_bytes(raw))  # type: ignore[misc]

    def _prepare(self) -> None:
        """Load the data, split it, build the model: whatever is wrong with them shows here."""
        config = self.config
        self.setup = setup = prepare(config)
        data = setup.data
        task: Task = config.task.create()
        self.attack: Attack | None = None
        if config.attack is not None and config.attack.name != "none":
            cls: Any = plugins.get("attack", config.attack.name)
            self.attack = cls(config.attack.parameters)
        try:
            module = initial_module(config, data)
        except (RuntimeError, TypeError, MemoryError, OverflowError) as error:  # sizes beyond this machine's memory
            said = " ".join(str(error).split())[:200] or "out of memory"
            raise InputError(f"task.model: the network cannot be built ({said}); use a smaller one") from None
        self.layout = Layout.of(module)
        model = FlatModel(module, device=self.device)
        if config.training.warm_start is not None:
            model.load(_warm_start(Path(config.training.warm_start), self.layout).to(self.device))
        self.initial = model.vector.clone()
        self.serve = server_maker(config, task, model, data, setup.server)
        self.described = task.describe(data)
        self.evaluator = Evaluator(task, model, data, setup.trigger, config.evaluation.batch_size, self.threads)

    def _rounds(self, grid: LocalGrid, directory: Path, *, honest: bool) -> None:
        """Play the rounds of the run or of its twin, from the last checkpoint on."""
        tables = Tables(directory)
        if is_played(directory):
            return
        stages: list[Defense] = [stage.create() for stage in self.config.defense]
        strategy = FederatedStrategy(
            self.config,
            self.plan,
            self.layout,
            self.initial.clone(),
            self.setup.sizes,
            stages,
            attack=self.attack,
            measure=self.evaluator.measure,
            on_round=lambda record: self._round_done(strategy, tables, record),
            serve=self.serve,
            trigger=self.evaluator.trigger,
            trigger_state=self._final_trigger() if honest else None,
            honest=honest,
        )
        self._restore(strategy, tables)
        self.progress.begin("clean twin" if honest else "attack", len(self.plan), strategy.start_round)
        try:
            play(strategy, grid)
        except KeyboardInterrupt:
            tables.write()
            raise
        except RunError:
            with contextlib.suppress(RunError):  # the first error is the one to report
                tables.write()
            raise
        if not honest:
            named = {n: t.cpu().contiguous() for n, t in self.layout.unflatten(strategy.global_vector).items()}
            raw = safetensors.torch.save(named)
            write_atomic(directory / "model.safetensors", lambda path: path.write_bytes(raw))
        tables.finish()

    def _final_trigger(self) -> State:
        """What a learnt trigger became in the run: the twin's floor is measured with that."""
        if self.evaluator.trigger is None or not self.evaluator.trigger.learnt():
            return {}
        found, damaged = checkpoint.load(self.directory / "checkpoints", self.config_hash)
        if found is None:
            raise InputError(f"the run's last checkpoint is missing or damaged {damaged}; start the run anew")
        return dict(found.state["trigger"])

    def _restore(self, strategy: FederatedStrategy, tables: Tables) -> None:
        found, damaged = checkpoint.load(tables.directory / "checkpoints", self.config_hash)
        for line in damaged:
            self.progress.say(line)
        if found is None:
            tables.resume(0)
            return
        tables.resume(found.round)
        state = found.state
        try:
            strategy.global_vector = _fitting(state["global_vector"], self.initial)
            last = state["last_aggregate"]
            strategy.last_aggregate = None if last is None else _fitting(last, self.initial)
            strategy.attack_state = dict(state["attack"])
            strategy.trigger_state = dict(state["trigger"])
            for stage, kept in zip(strategy.stages, state["defense"], strict=True):
                tensors, text = split_state(dict(kept))
                stage.state = join_state({name: t.to(self.device) for name, t in tensors.items()}, text)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the checkpoint of round {found.round} does not fit this run ({error}); start the run anew"
            ) from None
        strategy.start_round = found.round
        self.progress.say(f"continuing after round {found.round}")

    def _round_done(self, strategy: FederatedStrategy, tables: Tables, record: RoundRecord) -> None:
        started = time.perf_counter()
        for client in record.clients:
            if client.status in ("failed", "rejected"):
                self.progress.say(f"round {record.round}: client {client.client} {client.status}: {client.reason}")
        if record.note:
            self.progress.say(f"round {record.round}: {record.note.removeprefix(f'round {record.round}: ')}")
        record.seconds["record"] = self._last_record_seconds
        record.seconds["total"] = sum(record.seconds.get(k, 0.0) for k in ("train", "aggregate", "evaluate", "record"))
        tables.add(record)
        if record.round % self.config.output.checkpoint_every == 0 or record.round == len(self.plan):
            state = {
                "global_vector": strategy.global_vector,
                "last_aggregate": strategy.last_aggregate,
                "attack": strategy.attack_state,
                "trigger": strategy.trigger_state,
                "defense": [stage.state for stage in strategy.stages],
            }
            checkpoint.save(tables.directory / "checkpoints", Checkpoint(record.round, state), self.config_hash)
        self._last_record_seconds = time.perf_counter() - started
        self.progress.round(record)

    _last_record_seconds = 0.0
    """Seconds the round before took to be written: a round's own time is known only once its row is on disk."""

    def _finish(self) -> Run:
        root = self.directory
        twin = root / TWIN / "rounds.parquet"
        summary = summarise(
            pd.read_parquet(root / "rounds.parquet"),
            pd.read_parquet(root / "clients.parquet"),
            twin=pd.read_parquet(twin) if twin.exists() else None,
        )
        write_json(root / "summary.json", summary)
        self._manifest("finished")
        if self.config.output.tensorboard:
            from fedsim.report.tensorboard import write_events

            write_events(root)
        if self.config.output.report:
            write_report(root)  # the last file: what was killed before is ended when it is resumed
        return Run.open(root)

    def _manifest(self, status: str, reason: str = "") -> None:
        config = self.config
        said: dict[str, Any] = portable(
            {
                "name": config.name,
                "status": status,
                "reason": reason,
                "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
                "seconds": round(time.time() - self.started, 3),
                "seed": config.seed,
                "config_sha256": self.config_hash,
                "versions": manifest.versions(),
                "hardware": manifest.hardware(),
                "device": str(self.device),
                "engine": {
                    "name": config.engine.name,
                    "workers": self.workers,
                },
                "methods": manifest.methods(config),
                "adversary": manifest.adversary(self.plan),
                "data": {
                    **self.setup.data.source,
                    "fingerprint": self.setup.data.fingerprint,
                    "classes": self.setup.data.classes,
                    "class_names": list(self.setup.data.names),
                    **self.described,
                },
                "partition": describe(self.setup.parts, self.setup.data.train.labels, self.setup.data.classes),
                "examples": {
                    "train": len(self.setup.data.train),
                    "test": len(self.setup.data.test),
                    "triggered_test": None if self.evaluator.triggered is None else len(self.evaluator.triggered),
                },
                "model": {"entries": self.layout.size, "trainable": self.layout.trainable},
            }
        )
        write_json(self.directory / "manifest.json", said)


def _fitting(value: Any, like: Tensor) -> Tensor:
    """The tensor on the device of ``like``.

    Raises
    ------
    ValueError: it is no tensor of that shape and type.
    """
    if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(f"it holds no model of {len(like)} entries")
    return value.to(like.device)


def _warm_start(path: Path, layout: Layout) -> Tensor:
    """The vector (D,) of a saved model.

    Raises
    ------
    InputError: there is no such file, it is no safetensors file, or it is another model's.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"training.warm_start: {path} cannot be read: {error}") from None
    for entry in layout.entries:
        if entry.name not in tensors or tuple(tensors[entry.name].shape) != entry.shape:
            there = tuple(tensors[entry.name].shape) if entry.name in tensors else "nothing"
            raise InputError(
                f"training.warm_start: {path.name} does not fit the model: {entry.name} should be {entry.shape}, "
                f"the file has {there}"
            )
        if not tensors[entry.name].is_floating_point():
            raise InputError(f"training.warm_start: {path.name} holds {tensors[entry.name].dtype} in {entry.name}")
    vector = layout.flatten(tensors).float()
    if not torch.isfinite(vector).all():
        raise InputError(f"training.warm_start: {path.name} holds weights that are not finite")
    return vector
