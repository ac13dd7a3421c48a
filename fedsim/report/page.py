"""How a page is made of its template: one file that stands alone, and in which no script runs but its own."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

_HERE = Path(__file__).parent


def render(name: str, *, styles: Sequence[str], **values: Any) -> str:
    """The page of the template ``name.html.jinja`` with the script ``name.js`` and the style sheets named.

    Values are escaped unless they are :class:`~markupsafe.Markup`; a name that the template lacks is an error. The
    script is named by its hash in the page's Content-Security-Policy, which allows no other.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    script = (_HERE / f"{name}.js").read_text(encoding="utf-8")
    return environment.get_template(f"{name}.html.jinja").render(
        style="\n".join((_HERE / style).read_text(encoding="utf-8") for style in styles),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def _breakable(name: str) -> Markup:
    """A name that may be broken after an underscore."""
    return Markup(re.sub(r"([_/=])", r"\1<wbr>", str(escape(name))))
