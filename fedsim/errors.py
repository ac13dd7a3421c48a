"""The errors a user can meet; every one carries a message that says what to do instead."""

from __future__ import annotations

from dataclasses import dataclass


class FedsimError(Exception):
    """Base of all errors raised on purpose; ``exit_status`` is what the command line returns."""

    exit_status = 1


class InputError(FedsimError):
    """Something the user gave (config, data, plugin) cannot be used."""

    exit_status = 2


class PluginError(InputError):
    """A plugin is missing, is registered twice, or is not what it claims to be."""


class RunError(FedsimError):
    """The run itself failed: a client raised, a worker could not be replaced, the disk is full."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: where, and what is allowed there.

    absent: the config itself is right, but a file it names is not on this machine.
    """

    path: str
    message: str
    absent: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(InputError):
    """All problems of a configuration, reported together."""

    def __init__(self, problems: list[Problem], source: str = "") -> None:
        self.problems = problems
        self.source = source
        head = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        if source:
            head += f" in {source}"
        super().__init__("\n".join([head + ":", *(f"  {p}" for p in problems)]))
