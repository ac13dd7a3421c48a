"""fedsim in processes of its own that are stopped and killed; who lives on is looked up in /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def living(sign: str) -> dict[int, str]:
    """Processes that have ``sign`` (NAME=value) in the environment they were started with: id and command."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if sign.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
            except OSError:
                continue  # gone meanwhile, or not ours
    return found


def workers(sign: str) -> list[int]:
    """Those of them that are workers of a run."""
    return [pid for pid, command in living(sign).items() if "ray::_Worker" in command]


def wait(condition: Callable[[], Any], seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def rounds_in(directory: Path) -> int:
    """How many rounds of the run there are on disk."""
    try:
        return (directory / "journal.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


class Started:
    """``fedsim …`` in a process group of its own, as a shell starts it."""

    def __init__(self, *arguments: object) -> None:
        self.sign = f"FEDSIM_TEST_MARK={uuid.uuid4().hex}"
        name, _, value = self.sign.partition("=")
        self.process = subprocess.Popen(
            [
                *("env", "--default-signal=INT"),  # a shell that runs the suite in the background has it ignored
                *(sys.executable, "-m", "fedsim", *map(str, arguments)),
            ],
            env={**os.environ, name: value},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for it while the process is at work."""
        assert wait(lambda: condition() or self.process.poll() is not None, 90), "it takes too long"
        assert self.process.poll() is None, self.process.communicate()[0]

    def interrupt(self) -> str:
        """Ctrl-C, which a terminal sends to the whole group; what was printed. It has to end with status 130."""
        os.killpg(self.process.pid, signal.SIGINT)
        output, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 130, output
        assert "Traceback" not in output
        return output

    def kill(self, *, group: bool) -> None:
        """SIGKILL to the process alone, or to its whole group."""
        os.killpg(self.process.pid, signal.SIGKILL) if group else self.process.kill()
        self.process.wait(20)

    def clean_up(self) -> None:
        """Nothing that it started, directly or not, lives on."""
        for pid in living(self.sign):
            os.kill(pid, signal.SIGKILL)
        self.process.wait(20)
