"""Files are whole or absent, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from fedsim.errors import RunError
from fedsim.recording.files import disk_error, write_atomic, write_json, write_text

FULL = Path("/dev/full")
"""A device that is always full."""


def temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def test_text_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "naïve ✓")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "naïve ✓"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"], "nothing else is left"


def test_json_is_readable_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, 0.1, None, True]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"é": [1, 0.1, None, True]}
    assert text.endswith("}\n")
    assert "é" in text


def test_json_refuses_what_json_does_not_know(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert (tmp_path / "a.json").read_text() == "1\n"


@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_old_file_whole(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "table"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise error

    with pytest.raises(type(error)):
        write_atomic(path, write)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table"], "no temporary file is left"


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text("old")
    seen: list[str] = []

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent, "a rename works within one file system only"
        temporary.write_text("n")
        seen.append(path.read_text())
        temporary.write_text("new")
        seen.append(path.read_text())

    write_atomic(path, write)
    assert seen == ["old", "old"]
    assert path.read_text() == "new"


def test_the_content_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b))[1])
    write_text(tmp_path / "a", "x")
    assert events == ["fsync", "replace"]


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
def test_a_full_disk_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "rounds.parquet"
    path.write_text("old")
    temporary_of(path).symlink_to(FULL)  # whatever is written to the temporary file meets a full disk
    with pytest.raises(RunError, match=r"^the disk is full: rounds.parquet could not be written; free .* --resume$"):
        write_text(path, "new" * 10_000)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["rounds.parquet"]


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"gone/a\.txt could not be written: No such file or directory"):
        write_text(tmp_path / "gone" / "a.txt", "x")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_quota_is_a_full_disk(code: int) -> None:
    assert "the disk is full: x could not be written" in str(disk_error(Path("/a/x"), OSError(code, "no")))


def test_other_errors_say_what_the_system_says() -> None:
    assert str(disk_error(Path("/a/x"), OSError(errno.EROFS, "Read-only file system"))) == (
        "/a/x could not be written: Read-only file system"
    )
