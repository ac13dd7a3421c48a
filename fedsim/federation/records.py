"""What a round leaves behind: of each client, and as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedsim.federation.evaluation import Measurement


@dataclass(frozen=True)
class ClientRecord:
    """What happened to one client in one round.

    status: ok; dropped, straggler (the plan's); failed (its worker died); rejected (its reply was unusable: see
    reason). update_norm: L2 over the whole vector, as submitted. weight: share in the aggregate.
    """

    client: int
    malicious: bool
    examples: int
    status: str = "ok"
    update_norm: float | None = None
    accepted: bool = False
    weight: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass
class RoundRecord:
    """Everything a round leaves behind; note: what is worth saying of it."""

    round: int
    clients: list[ClientRecord]
    measurement: Measurement | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def malicious_submitted(self) -> int:
        return sum(c.malicious and c.status in ("ok", "rejected") for c in self.clients)

    @property
    def malicious_accepted(self) -> int:
        return sum(c.malicious and c.accepted for c in self.clients)
