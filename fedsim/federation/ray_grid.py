"""The Grid over Ray actors: each keeps the task's data and one model resident and plays client after client.

The global arrays go into the object store once a round; several small clients travel in one call; replies come
back as zero-copy arrays. A worker that dies, or hangs for longer than a client may take, is replaced and its clients
are played again, alone. A worker that finds no room any more (its node has left) is given up; with none left the run
stops and can be resumed.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from flwr.app import ArrayRecord, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError

from fedsim.errors import RunError
from fedsim.federation.cluster import Resources, room_on_gpus, start_ray
from fedsim.federation.grids import RUN_ID, LocalGrid, call
from fedsim.federation.messages import identify

_CALLS_AHEAD = 2  # calls queued at a worker, so that it never waits for the driver
_LEAST_CALL_SECONDS = 0.01  # clients shorter than this share a call
_START_SECONDS = 120.0  # for a worker to start: it loads torch, and the cluster may have to find room for it


class _Worker:
    """The actor: one process, one ClientApp."""

    def __init__(self, make_app: Callable[[], ClientApp], nodes: int) -> None:
        torch.set_num_threads(1)
        identify(RUN_ID)
        self.nodes = nodes
        self.app = make_app()

    def ready(self) -> int:
        return os.getpid()

    def answer(self, calls: list[tuple[Message, dict[str, int]]], *shared: ArrayRecord) -> list[tuple[Message, float]]:
        """Replies and seconds of the messages; their shared arrays arrive once, beside them."""
        replies = []
        for message, places in calls:
            for name, place in places.items():
                message.content[name] = shared[place]
            started = time.perf_counter()
            reply = call(self.app, message, self.nodes)
            replies.append((reply, time.perf_counter() - started))
        return replies


@dataclass(eq=False)
class _Call:
    """Messages that travel to a worker together; ``alone`` after one of them may have killed a worker."""

    messages: list[Message]
    tries: int = 0
    alone: bool = False


@dataclass(eq=False)
class _Slot:
    """A worker and what is queued at it.

    since: when the first of its calls became the first. starting: its start, until that has been seen.
    """

    actor: Any
    calls: list[_Call] = field(default_factory=list)
    since: float = 0.0
    starting: Any = None


@dataclass
class _Round:
    """The messages of one round on their way.

    shared: the array records that several messages carry, in the object store. places: by message id, which of them
    stands where in the message. running: calls at workers, by their result to come. replies: by message id.
    """

    shared: list[Any]
    places: dict[str, dict[str, int]]
    waiting: deque[_Call]
    running: dict[Any, tuple[_Slot, _Call]] = field(default_factory=dict)
    replies: dict[str, Message] = field(default_factory=dict)


class RayGrid(LocalGrid):
    """See the module.

    make_app: builds the ClientApp inside each worker. size_of: (kind, size) of a message's work; the time per
    size is learnt per kind and used to hand out long clients first — it never influences a result. stop_ray:
    whether ``close`` shuts Ray down (it does where this grid started it).

    Raises
    ------
    RunError: Ray cannot start the workers.
    """

    def __init__(
        self,
        make_app: Callable[[], ClientApp],
        nodes: int,
        resources: Resources,
        *,
        size_of: Callable[[Message], tuple[str, float]] = lambda message: ("client", 1.0),
        on_reply: Callable[[], None] | None = None,
        stop_ray: bool = True,
    ) -> None:
        super().__init__(nodes)
        self.resources, self.size_of, self.on_reply = resources, size_of, on_reply
        self.replaced = 0
        self._rates: dict[str, float] = {}
        self._ours = start_ray(resources) or stop_ray
        self._make_app = ray.put(make_app)
        try:
            self._check_room()
            self._slots = [_Slot(self._spawn()) for _ in range(resources.workers)]
            ray.get([slot.actor.ready.remote() for slot in self._slots], timeout=_START_SECONDS)
        except GetTimeoutError:
            self.close()
            raise RunError(
                f"{resources.workers} workers did not start within {_START_SECONDS:g} s: the cluster is busy; "
                f"lower engine.workers or engine.cpus_per_worker, or try again later"
            ) from None
        except RayError as error:
            self.close()
            last = [line for line in str(error).splitlines() if line.strip()][-1]  # of the worker's traceback
            raise RunError(f"the workers cannot start: {last.strip()}") from error

    def _check_room(self) -> None:
        """Raise RunError where the cluster can never hold the workers."""
        r, there = self.resources, ray.cluster_resources()
        cores, gpus, refused = float(there.get("CPU", 0.0)), float(there.get("GPU", 0.0)), ""
        if r.workers * r.cpus > cores:
            refused = (
                f"{r.workers} workers of {r.cpus:g} cores need {r.workers * r.cpus:g}; the Ray cluster has "
                f"{cores:g}: lower engine.workers or engine.cpus_per_worker"
            )
        elif r.gpus > 1 and not r.gpus.is_integer():
            refused = f"engine.gpus_per_worker is {r.gpus:g}; write a share of one GPU, or a whole number of them"
        elif r.gpus > 0 and r.workers > room_on_gpus(gpus, r.gpus):
            refused = (
                f"{r.workers} workers of {r.gpus:g} GPUs do not fit; the Ray cluster has {gpus:g}: "
                f"lower engine.workers or engine.gpus_per_worker"
            )
        if refused:
            self.close()
            raise RunError(refused)

    def _spawn(self) -> Any:
        remote = ray.remote(num_cpus=self.resources.cpus, num_gpus=self.resources.gpus, max_restarts=0)(_Worker)
        return remote.remote(self._make_app, self.nodes)

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        pids: list[int] = ray.get([slot.actor.ready.remote() for slot in self._slots])
        return pids

    def answer(self, messages: list[Message]) -> list[Message]:
        if not messages:
            return []
        shared, places = self._share(messages)
        round = _Round(shared, places, deque(self._calls(messages)))
        self._see_started()
        self._hand_out(round)
        while round.running or round.waiting:
            self._wait(round)
            self._hand_out(round)
        return [round.replies[message.metadata.message_id] for message in messages]

    def close(self) -> None:
        if not ray.is_initialized():
            return
        for slot in getattr(self, "_slots", []):
            ray.kill(slot.actor)
        self._slots = []
        if self._ours:
            ray.shutdown()

    # ------------------------------------------------------------------------------------- into the workers

    def _share(self, messages: list[Message]) -> tuple[list[Any], dict[str, dict[str, int]]]:
        """Put array records that several messages carry into the object store, once; take them off the messages."""
        seen: dict[int, list[tuple[Message, str]]] = {}
        for message in messages:
            for name, record in message.content.items():
                if isinstance(record, ArrayRecord) and record:
                    seen.setdefault(id(record), []).append((message, name))
        shared: list[Any] = []
        places: dict[str, dict[str, int]] = {m.metadata.message_id: {} for m in messages}
        for holders in seen.values():
            if len(holders) < 2:
                continue
            first, name = holders[0]
            shared.append(ray.put(first.content[name]))
            for message, key in holders:
                places[message.metadata.message_id][key] = len(shared) - 1
                del message.content[key]
        return shared, places

    def _seconds(self, message: Message) -> float:
        kind, size = self.size_of(message)
        known = self._rates.get(kind)
        if known is None:
            known = max(self._rates.values(), default=0.0)
        return known * size

    def _learn(self, message: Message, seconds: float) -> None:
        kind, size = self.size_of(message)
        rate = seconds / max(size, 1e-9)
        self._rates[kind] = 0.8 * self._rates[kind] + 0.2 * rate if kind in self._rates else rate

    def _calls(self, messages: list[Message]) -> list[_Call]:
        """The messages in calls, the longest first; short clients share a call."""
        workers = len(self._slots)
        timed = [(self._seconds(m), m) for m in messages]
        total = sum(seconds for seconds, _ in timed)
        if total == 0.0:  # nothing is known yet
            size = max(1, len(messages) // (workers * 4))
            return [_Call(messages[i : i + size]) for i in range(0, len(messages), size)]
        timed.sort(key=lambda item: -item[0])
        enough = max(total / (workers * 8), _LEAST_CALL_SECONDS)
        calls: list[_Call] = []
        current: list[Message] = []
        spent = 0.0
        for seconds, message in timed:
            current.append(message)
            spent += seconds
            if spent >= enough:
                calls.append(_Call(current))
                current, spent = [], 0.0
        return [*calls, _Call(current)] if current else calls

    def _takes(self, slot: _Slot, work: _Call) -> bool:
        """Whether the worker may be given this call now: a call that is played alone gets an idle worker."""
        if slot.starting is not None or any(call_.alone for call_ in slot.calls):
            return False
        return not slot.calls if work.alone else len(slot.calls) < _CALLS_AHEAD

    def _hand_out(self, round: _Round) -> None:
        """Give the waiting calls to workers, as far as these take any."""
        while round.waiting:
            free = [slot for slot in self._slots if self._takes(slot, round.waiting[0])]
            if not free:
                return
            slot, work = min(free, key=lambda s: len(s.calls)), round.waiting.popleft()
            payload = [(m, round.places[m.metadata.message_id]) for m in work.messages]
            if not slot.calls:
                slot.since = time.monotonic()
            slot.calls.append(work)
            round.running[slot.actor.answer.remote(payload, *round.shared)] = (slot, work)

    # -------------------------------------------------------------------------------------- and out of them

    def _wait(self, round: _Round) -> None:
        """Wait for a call's end, a worker's start or the end of somebody's time, and do what follows from it."""
        starting = {slot.starting: slot for slot in self._slots if slot.starting is not None}
        pending = [*round.running, *starting]
        done, _ = ray.wait(pending, num_returns=1, timeout=self._patience()) if pending else ([], [])
        if not done:
            self._stop_overdue(round)
            self._drop_slots_without_room()
        elif done[0] in starting:
            self._started(starting[done[0]])
        else:
            self._take(done[0], round)

    def _take(self, result: Any, round: _Round) -> None:
        """Take the answers of a call that has ended, or what its worker died of.

        Raises
        ------
        RunError: the call failed, and not by its worker's death.
        """
        slot, work = round.running.pop(result)
        slot.calls.remove(work)
        slot.since = time.monotonic()
        try:
            answers = ray.get(result)
        except (RayActorError, OutOfMemoryError) as error:
            for lost in [work, *self._replace(slot, round)]:
                self._again(lost, str(error), round)
        except RayError as error:
            raise RunError(f"a Ray worker failed: {' '.join(str(error).split())}") from error
        else:
            for message, (reply, seconds) in zip(work.messages, answers, strict=True):
                self._learn(message, seconds)
                self._answered(message, reply, round)

    def _answered(self, message: Message, reply: Message, round: _Round) -> None:
        """Keep a client's reply, and tell who listens."""
        round.replies[message.metadata.message_id] = reply
        if self.on_reply is not None:
            self.on_reply()

    def _again(self, work: _Call, why: str, round: _Round) -> None:
        """Play the clients of a lost call again, each alone, or give them up."""
        for message in work.messages:
            if work.tries < self.resources.retries:
                round.waiting.append(_Call([message], work.tries + 1, alone=True))
            else:
                reason = f"its worker died {work.tries + 1} times ({' '.join(why.split())[:200]})"
                self._give_up(message, reason, round)

    def _give_up(self, message: Message, reason: str, round: _Round) -> None:
        """Answer for a client that will not."""
        error = Error(ErrorCode.CLIENT_APP_CRASHED, reason)
        self._answered(message, Message(error, reply_to=message), round)

    # ------------------------------------------------------------------------- workers that die or take long

    def _replace(self, slot: _Slot, round: _Round) -> list[_Call]:
        """Put a new worker where this one was; the calls that were still queued at it."""
        lost = [ref for ref, (other, _) in round.running.items() if other is slot]
        self.replaced += 1
        ray.kill(slot.actor)
        slot.actor, slot.calls, slot.since = self._spawn(), [], time.monotonic()
        slot.starting = slot.actor.ready.remote()
        return [round.running.pop(ref)[1] for ref in lost]

    def _see_started(self) -> None:
        """Take note of the replacements that have come up since the round before, so that they get work at once."""
        for slot in [slot for slot in self._slots if slot.starting is not None]:
            if ray.wait([slot.starting], timeout=0)[0]:
                self._started(slot)

    def _started(self, slot: _Slot) -> None:
        """Take note that a replacement is there; one that has died on the way is given up.

        Raises
        ------
        RunError: no worker is left.
        """
        ref, slot.starting = slot.starting, None
        try:
            ray.get(ref)
        except RayError as error:
            self._slots.remove(slot)
            if not self._slots:
                raise RunError(f"no worker is left: {' '.join(str(error).split())[:300]}; resume the run") from error

    def _limit(self, slot: _Slot) -> float | None:
        """Seconds from ``slot.since`` until the slot is overdue, or None."""
        if slot.starting is not None:
            return _START_SECONDS
        if self.resources.timeout is None or not slot.calls:
            return None
        return self.resources.timeout * len(slot.calls[0].messages)

    def _patience(self) -> float | None:
        """Seconds until the first slot is overdue; None: for ever."""
        limits = [slot.since + limit for slot in self._slots if (limit := self._limit(slot)) is not None]
        return max(min(limits) - time.monotonic(), 0.0) if limits else None

    def _is_overdue(self, slot: _Slot) -> bool:
        limit = self._limit(slot)
        return limit is not None and time.monotonic() >= slot.since + limit

    def _stop_overdue(self, round: _Round) -> None:
        """Replace the workers whose first call takes too long; a client that was alone in it is given up."""
        for slot in [slot for slot in self._slots if slot.starting is None and self._is_overdue(slot)]:
            late = slot.calls[0]
            for work in self._replace(slot, round):
                if work is late and len(work.messages) == 1:
                    reason = f"no reply within {self.resources.timeout:g} s (engine.client_timeout)"
                    self._give_up(work.messages[0], reason, round)
                else:
                    round.waiting.extend(_Call([message], work.tries, alone=True) for message in work.messages)

    def _drop_slots_without_room(self) -> None:
        """Give up replacements that have not started in time.

        Raises
        ------
        RunError: no worker is left.
        """
        late = [slot for slot in self._slots if slot.starting is not None and self._is_overdue(slot)]
        for slot in late:
            ray.kill(slot.actor)
            self._slots.remove(slot)
        if not self._slots:
            raise RunError(
                f"no worker is left, and none started within {_START_SECONDS:g} s: the cluster has lost its room; "
                f"resume the run when it is back"
            )
