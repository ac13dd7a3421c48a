"""docs/reliability.md: every test it names is there."""

from __future__ import annotations

import re

from tests.support.places import ROOT


def test_every_test_that_the_page_on_reliability_names_is_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 40
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert missing == []
    assert page.count("`tests/") == len(named), "a test is named with its file and its function"
    assert len(re.findall(r"^## \d", page, re.MULTILINE)) == 7, "a section for each promise"
