"""The schema: a dataclass a section, one documented field a key."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar

import yaml

from fedsim import plugins
from fedsim.plugins import Parameters, parameter


@dataclass
class Choice:
    """A plugin chosen by name, with its parameters; ``create()`` makes the instance."""

    kind: str
    name: str
    parameters: Parameters

    def create(self) -> Any:
        return plugins.get(self.kind, self.name)(self.parameters)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self.parameters)}


def choice(kind: str, default: Any, doc: str) -> Any:
    """A field holding one plugin; ``default`` is what a config that says nothing gets (a name or a mapping)."""
    return field(default=None, metadata={"doc": doc, "plugin": kind, "plugin_default": default})


def choices(kind: str, doc: str) -> Any:
    """A field holding a list of plugins, empty by default."""
    return field(default_factory=list, metadata={"doc": doc, "plugins": kind})


@dataclass
class MethodSection:
    """A section whose method's own parameters sit beside the keys that are the same for all of its kind."""

    method: ClassVar[str] = ""
    """Kind of the plugin that ``name`` names."""
    dropped: ClassVar[tuple[str, ...]] = ()
    """Keys that do not pass on to another method named in a later file, as the method's own never do."""

    @classmethod
    def kept(cls) -> set[str]:
        """The keys that do."""
        return {f.name for f in fields(cls)} - {"name", "parameters", *cls.dropped}


@dataclass
class TaskConfig(MethodSection):
    """What is learnt. The task's own parameters sit beside these keys."""

    method = "task"
    dropped = ("data", "model")

    name: str = parameter("vision", "task family")
    data: Choice = choice("dataset", "mnist5k", "data set: embedded, a directory of Parquet files, or a hub id")
    model: Choice = choice("model", "cnn", "network")
    train_examples: int | None = parameter(None, "use only this many training images or texts (seeded draw)", ge=1)
    test_examples: int | None = parameter(None, "use only this many test images or texts (seeded draw)", ge=1)
    parameters: Parameters = field(default_factory=Parameters, metadata={"doc": "", "internal": True})

    def create(self) -> Any:
        return plugins.get("task", self.name)(self.parameters)


@dataclass
class FederationConfig:
    """Who takes part."""

    clients: int = parameter(40, "clients in the population", ge=1)
    clients_per_round: int = parameter(10, "clients sampled in a round, n", ge=1)
    rounds: int = parameter(100, "rounds", ge=1)
    partition: Choice = choice("partition", {"name": "dirichlet", "alpha": 1.0}, "how data is split over clients")
    dropout: float = parameter(0.0, "probability that a sampled client never replies", ge=0, lt=1)
    stragglers: float = parameter(0.0, "probability that a client replies too late and is left out", ge=0, lt=1)
    weighting: str = parameter("examples", "weight of a client in the mean", choices=("examples", "uniform"))
    server_lr: float = parameter(1.0, "server learning rate η: global ← global + η · aggregate", gt=0)


@dataclass
class TrainingConfig:
    """How an honest client trains (SGD)."""

    lr: float = parameter(0.05, "learning rate of round 1", gt=0)
    lr_decay: float = parameter(1.0, "factor on the learning rate per round, γ", gt=0, le=1)
    momentum: float = parameter(0.9, "SGD momentum, reset every round", ge=0, lt=1)
    weight_decay: float = parameter(0.0, "SGD weight decay", ge=0)
    local_epochs: int = parameter(2, "passes over the client's data per round", ge=1)
    local_steps: int | None = parameter(None, "optimiser steps per round, instead of local_epochs", ge=1)
    batch_size: int = parameter(32, "examples per batch", ge=1)
    augment: bool = parameter(False, "random crop (padding 4) and horizontal flip")
    amp: bool = parameter(False, "bf16 autocast")
    channels_last: bool = parameter(False, "channels-last inputs (faster convolutions on a GPU)")
    warm_start: str | None = parameter(None, "model.safetensors of an earlier run to start from")


@dataclass
class AttackConfig(MethodSection):
    """The adversary: trigger × schedule × attack. The attack's own parameters sit beside these keys."""

    method = "attack"

    name: str = parameter("none", "attack method; none: nobody attacks, but the trigger is still measured")
    trigger: Choice = choice("trigger", "pixel_pattern", "what the backdoor is")
    schedule: Choice = choice("schedule", {"name": "continuous"}, "when malicious clients take part")
    craft: list[Choice] = choices("craft", "steps after training, in order: scale (boost), project (norm ball)")
    poison_fraction: float = parameter(0.5, "share of each malicious batch that carries the trigger", ge=0, le=1)
    lr: float | None = parameter(None, "attacker's learning rate of round 1 (decays as training.lr); null: same", gt=0)
    local_epochs: int | None = parameter(None, "attacker's local epochs; null: as training.local_epochs", ge=1)
    local_steps: int | None = parameter(None, "attacker's steps; null: as its epochs say", ge=1)
    parameters: Parameters = field(default_factory=Parameters, metadata={"doc": "", "internal": True})


@dataclass
class ServerDataConfig:
    """Data at the server, for the defenses that need some. Nobody else trains or is measured on them."""

    examples: int = parameter(0, "how many; 0: none", ge=0)
    source: str = parameter(
        "train",
        "train, test: kept back from that part of the task's data; other: another data set's; noise: random inputs",
        choices=("train", "test", "other", "noise"),
    )
    other: Choice = choice("dataset", "mnist5k", "data set that source: other takes them from (labels are random)")


@dataclass
class EvaluationConfig:
    """What is measured, and when."""

    every: int = parameter(1, "evaluate every this many rounds (the last one always)", ge=1)
    batch_size: int = parameter(256, "examples per evaluation batch", ge=1)
    twin: bool = parameter(False, "also run the clean twin: same seeds, the malicious clients train honestly")


@dataclass
class EngineConfig:
    """What it runs on. Results do not depend on anything here (on CPU), unless a client is given up."""

    name: str = parameter("ray", "ray: actors in processes; serial: in this process", choices=("ray", "serial"))
    workers: int | str = parameter("auto", "worker processes; auto: as many as the cores (or GPU shares) allow")
    cpus_per_worker: float = parameter(1.0, "cores a worker reserves", gt=0)
    gpus_per_worker: float | None = parameter(None, "share of a GPU per worker; null: share the GPUs evenly", ge=0)
    address: str | None = parameter(None, "address of a running Ray cluster; null: start one")
    device: str = parameter("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    retries: int = parameter(2, "times a client's round is run again after its worker died", ge=0)
    client_timeout: float | None = parameter(
        None, "seconds a client may take for a round before it counts as failed (ray only); null: no limit", gt=0
    )


@dataclass
class OutputConfig:
    """What is written."""

    dir: str = parameter("runs", "parent of the run directories: <dir>/<name>/<run id>")
    checkpoint_every: int = parameter(10, "rounds between checkpoints", ge=1)
    report: bool = parameter(True, "write report.html and the figures")
    tensorboard: bool = parameter(False, "write TensorBoard event files")


@dataclass
class Config:
    """One experiment."""

    name: str = parameter("experiment", "name of the experiment; default: the file's name")
    seed: int = parameter(0, "seed of every random stream of the run", ge=0)
    plugins: list[str] = parameter([], "Python files with plugins of your own")
    task: TaskConfig = field(default_factory=TaskConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    attack: AttackConfig | None = field(default_factory=AttackConfig)
    defense: list[Choice] = choices("defense", "stages of the server's pipeline, in order; empty: plain FedAvg")
    server_data: ServerDataConfig = field(default_factory=ServerDataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers that load back to the same config."""
        result: dict[str, Any] = _plain(self)
        return result

    def to_yaml(self) -> str:
        """A file that loads back to the same config."""
        return yaml.dump(self.to_dict(), Dumper=ConfigDumper, sort_keys=False, allow_unicode=True)


class ConfigDumper(yaml.SafeDumper):
    """Writes text so that OmegaConf reads it as text: ``1e-3`` is a number to it, ``${`` opens an interpolation."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quote = "'" if text[:1] in tuple("0123456789+-.") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text.replace("${", "\\${"), style=quote)


ConfigDumper.add_representer(str, _text)


def _plain(value: Any) -> Any:
    if isinstance(value, Choice):
        return value.to_dict()
    if isinstance(value, (TaskConfig, AttackConfig)):
        own = {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.name != "parameters"}
        return {"name": own.pop("name"), **dataclasses.asdict(value.parameters), **own}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def section_class(cls: type | None, key: str) -> type | None:
    if cls is None or key not in {f.name for f in fields(cls)}:
        return None
    return dataclass_in(hints_of(cls)[key])


@cache
def hints_of(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def dataclass_in(hint: Any) -> type | None:
    """The section class a type hint names (``X`` or ``X | None``), if it is one."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if isinstance(option, type) and dataclasses.is_dataclass(option) and option not in (Choice, Parameters):
            return option
    return None
