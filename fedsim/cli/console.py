"""Where the command line writes to, and what may be written there."""

from __future__ import annotations

import unicodedata

from rich.console import Console
from rich.text import Text

from fedsim.errors import FedsimError

out = Console()
err = Console(stderr=True)


def complain(error: FedsimError) -> None:
    err.print(Text.assemble(("error: ", "bold red"), harmless(str(error))), soft_wrap=True)


def harmless(text: str) -> str:
    """Text from a config, a file or a client as it may be shown: nothing in it steers a terminal."""
    return "".join(c if unicodedata.category(c)[0] != "C" or c in "\n\t" else "�" for c in text)
