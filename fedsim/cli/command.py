"""What ``--help`` of a command shows."""

from __future__ import annotations

import typing
from typing import Any

from typer.core import TyperCommand
from typer.models import ArgumentInfo


class Command(TyperCommand):
    """A command whose help is laid out by the width of the terminal, and says what each argument is.

    Paragraphs are filled anew; those with indented lines (examples) stay as written. Click 8.5 has a help of its own
    for arguments, and sets back the one that typer (0.20, which Flower asks for) has put there.
    """

    def __init__(self, name: str | None, *, callback: Any = None, help: str | None = None, **rest: Any) -> None:
        paragraphs = (help or "").split("\n\n")
        filled = "\n\n".join(p if "\n " in p else p.replace("\n", " ") for p in paragraphs)
        super().__init__(name, callback=callback, help=filled, **rest)
        said = {
            argument: info.help
            for argument, hint in typing.get_type_hints(callback, include_extras=True).items()
            for info in getattr(hint, "__metadata__", ())
            if isinstance(info, ArgumentInfo)
        }
        for parameter in self.params:
            if parameter.name in said and getattr(parameter, "help", None) is None:
                parameter.help = said[parameter.name]
