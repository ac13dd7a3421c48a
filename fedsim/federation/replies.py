"""The replies of a round: the guard before every defense, and one matrix of the updates that pass it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Message
from flwr.common.constant import ErrorCode
from torch import Tensor

from fedsim.errors import RunError
from fedsim.federation.messages import to_vector, unpack_state
from fedsim.federation.records import ClientRecord
from fedsim.federation.schedule import RoundPlan
from fedsim.local import State

_LARGEST = 1e15
"""An entry of an update beyond this is no update: the squares of 1e7 of them still add up in float32."""


@dataclass(frozen=True)
class Replies:
    """What the replies of a round come to.

    updates: (N, D), client minus global; the next round uses its memory again. clients: ids behind the rows, ascending.
    records: of every client in the plan, by id; those of the rows are ``ok``, and lack what a defense makes of them.
    states: what the malicious clients among them keep, in the order of their running numbers.
    seconds: of the slowest client, of a malicious one, and what attacks measured of themselves.
    """

    updates: Tensor
    clients: list[int]
    records: dict[int, ClientRecord]
    states: list[State]
    seconds: dict[str, float]

    @property
    def num_examples(self) -> Tensor:
        """(N,) examples of the clients behind the rows, in the dtype of the updates."""
        examples = [self.records[client].examples for client in self.clients]
        return torch.tensor(examples, dtype=self.updates.dtype, device=self.updates.device)

    @property
    def malicious(self) -> Tensor:
        """(N,) bool, which rows are malicious clients'."""
        malicious = [self.records[client].malicious for client in self.clients]
        return torch.tensor(malicious, dtype=torch.bool, device=self.updates.device)


class ReplyReader:
    """Reads the replies of round after round into one matrix.

    sizes: examples of every client. most: replies that a round may have.
    """

    def __init__(self, sizes: list[int], most: int) -> None:
        self.sizes, self.most = sizes, most
        self._matrix: Tensor | None = None

    def read(self, plan: RoundPlan, answered: dict[int, Message], base: Tensor) -> Replies:
        """Lay the usable replies into the matrix; say of every client in the plan what became of it.

        answered: replies by client. base: (D,) the model that was sent, which updates are relative to.

        Raises
        ------
        RunError: a client's own code failed.
        """

        def record(client: int, status: str, reason: str = "") -> ClientRecord:
            malicious = client in plan.malicious
            return ClientRecord(client, malicious, self.sizes[client], status, reason=reason)

        if self._matrix is None:
            self._matrix = torch.empty((self.most, len(base)), dtype=base.dtype, device=base.device)
        clients: list[int] = []
        records: dict[int, ClientRecord] = {}
        states: dict[int, State] = {}
        seconds: dict[str, float] = {}
        for status, absent in (("dropped", plan.dropped), ("straggler", plan.stragglers)):
            records.update({client: record(client, status) for client in absent})
        for client in plan.replying:
            reply = answered.get(client)
            lost = "no reply in time" if reply is None else why_lost(reply, plan.round, client)
            if reply is None or lost:
                records[client] = record(client, "failed", lost)
                continue
            examples, reason = self._lay(reply, client, base, self._matrix[len(clients)])
            if client in plan.malicious and not reason:
                try:
                    states[plan.malicious[client]] = unpack_state(reply.content)
                except ValueError as error:
                    reason = f"unusable reply: {error}"
            if reason:
                records[client] = ClientRecord(client, client in plan.malicious, examples, "rejected", reason=reason)
                continue
            records[client] = record(client, "ok")
            clients.append(client)
            _time(seconds, reply.content["metrics"], malicious=client in plan.malicious)
        by_number = [states[number] for number in sorted(states)]
        return Replies(self._matrix[: len(clients)], clients, records, by_number, seconds)

    def _lay(self, reply: Message, client: int, base: Tensor, row: Tensor) -> tuple[int, str]:
        """Write one reply's update into its row; (examples, why it cannot be used or "").

        This is the guard before every defense: what passes has the model's shape, is finite and of some measure, and
        counts as many examples as the client has.
        """
        try:
            examples = reply.content["metrics"]["num-examples"]
            local = to_vector(reply.content["arrays"])
        except KeyError as error:
            return 0, f"unusable reply: it has no {error}"
        except ValueError as error:
            return 0, f"unusable reply: {error}"
        if type(examples) is not int or examples != self.sizes[client]:
            return 0, f"a number of examples of {str(examples)[:40]}; it has {self.sizes[client]}"
        if local.shape != row.shape:
            return examples, f"an array of shape {tuple(local.shape)}, the model has {tuple(row.shape)}"
        torch.sub(local.to(row.device, row.dtype), base, out=row)
        return examples, beyond_measure(row)


def why_lost(reply: Message, round: int, client: int) -> str:
    """Why a client's worker gave no answer, "" if it did.

    Raises
    ------
    RunError: the client's own code failed.
    """
    if not reply.has_error():
        return ""
    if reply.error.code != ErrorCode.CLIENT_APP_CRASHED:
        raise RunError(f"round {round}, client {client} failed:\n{reply.error.reason}")
    return reply.error.reason or "its worker died"


def beyond_measure(updates: Tensor) -> str:
    """What is wrong with the size of an entry of ``updates`` (any shape), "" if nothing is."""
    if updates.numel() == 0:
        return ""
    largest = max(abs(float(end)) for end in torch.aminmax(updates))  # one pass; NaN spreads
    if not math.isfinite(largest):
        return "an update that is not finite"
    if largest > _LARGEST:
        return f"an update beyond measure, with an entry of {largest:.1e}"
    return ""


def _time(seconds: dict[str, float], metrics: Any, *, malicious: bool) -> None:
    """Add what a client's metrics say of its time."""
    own = _number(metrics.get("seconds"))
    seconds["slowest_client"] = max(own, seconds.get("slowest_client", own))
    if not malicious:
        return
    for name, value in metrics.items():
        if name.startswith("attack-"):
            seconds[name.replace("-", "_")] = _number(value)
    seconds["malicious_client"] = own


def _number(value: Any) -> float:
    """A metric that a client reports about itself, as far as it is a number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
