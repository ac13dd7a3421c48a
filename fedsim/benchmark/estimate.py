"""How long a benchmark will take yet."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from statistics import mean

from fedsim.benchmark.jobs import Job


class Estimate:
    """The time left: what is left is played in its order, on as many places as there have been runs at a time.

    A round takes what a round of the same attack has taken so far. What a run takes besides its rounds (a process
    starts, data are loaded, a report is written) is taken from those that have ended, or else from how long the others
    were without a round.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.places = 1

    def changed(self) -> None:
        """Some run has begun, or has ended."""
        self.places = max(self.places, sum(job.state == "running" for job in self.jobs))

    def seconds(self) -> float | None:
        """None while nothing is known."""
        self.changed()
        played = [job for job in self.jobs if not job.kept and job.state in ("running", "done")]
        paces = self._paces(played)
        if not paces:
            return None
        usual = mean(paces.values())
        besides = _besides(played, paces)
        now = time.monotonic()
        free = [0.0] * self.places  # in how many seconds each place is
        for job in sorted(self.jobs, key=lambda job: job.state != "running"):
            takes = paces.get(job.kind, usual) * (job.rounds - job.round)
            if job.state == "running":
                since = now - (job.started if job.last is None else job.last[0])
                heapq.heapreplace(free, max(0.0, takes + (besides if job.last is None else 0.0) - since))
            elif job.state == "waiting":
                heapq.heapreplace(free, free[0] + takes + besides)
        return max(free)

    @staticmethod
    def _paces(played: Sequence[Job]) -> dict[str, float]:
        """Seconds a round, by the kind of run, from the rounds that were seen to come."""
        spent: dict[str, list[tuple[float, int]]] = {}
        for job in played:
            if job.first is not None and job.last is not None and job.last[1] > job.first[1]:
                spent.setdefault(job.kind, []).append((job.last[0] - job.first[0], job.last[1] - job.first[1]))
            elif job.state == "done" and job.round > job.began_at:  # over before anybody looked
                spent.setdefault(job.kind, []).append((job.seconds, job.round - job.began_at))
        return {kind: sum(s for s, _ in found) / sum(n for _, n in found) for kind, found in spent.items()}


def _besides(played: Sequence[Job], paces: dict[str, float]) -> float:
    """Seconds that a run takes beside its rounds."""
    ended = [
        job.seconds - paces.get(job.kind, 0.0) * (job.round - job.began_at) for job in played if job.state == "done"
    ]
    begun = [
        job.first[0] - job.started - paces[job.kind] * (job.first[1] - job.began_at)
        for job in played
        if job.first is not None and job.kind in paces
    ]
    found = ended or begun
    return max(0.0, mean(found)) if found else 0.0
