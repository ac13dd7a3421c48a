"""What malformed files are made with: what must never be executed or unfolded, and places to put it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CANARY = "canary"
"""The file that lies in the working directory once any of these has been executed."""
PYTHON_OBJECT = f'!!python/object/apply:os.system ["touch {CANARY}"]'
"""A value of YAML that an unsafe loader executes."""
ANCHORS = b"a: &a [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (b, b, b", ".join([b"*%c" % a] * 10))
    for a, b in zip(range(97, 110), range(98, 111), strict=True)
)
"""Lines of YAML that unfold to 10¹⁴ values."""


class Boom:
    """Unpickled, it leaves that file behind."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(CANARY),))


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of nested containers lies."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [prefix] if prefix else []
    for key, item in items:
        found += paths(item, (*prefix, key))
    return found
