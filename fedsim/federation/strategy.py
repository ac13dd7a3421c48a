"""The Flower Strategy: one round, from the plan to the new global model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim import streams
from fedsim.attack import Attack, CoordinationKnowledge, Knowledge
from fedsim.config import Config
from fedsim.defense import Aggregation, Defense, RoundUpdates, Server, TooFewClients, apply_pipeline, require
from fedsim.errors import RunError
from fedsim.federation.evaluation import Measurement
from fedsim.federation.messages import pack_state, to_record, to_vector, unpack_state
from fedsim.federation.schedule import RoundPlan
from fedsim.layout import Layout
from fedsim.local import State
from fedsim.trigger import Trigger

_REGISTRATION_SECONDS = 60.0
"""How long the first round waits for nodes to register (with our own grids they are there at once)."""


_LARGEST = 1e15
"""An entry of an update beyond this is no update: the squares of 1e7 of them still add up in float32."""


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


class FederatedStrategy(Strategy):
    """Plays the plan: sends the model, lays the replies into one matrix, runs the defense, moves the model.

    Attributes
    ----------
    global_vector: (D,) the global model after the last finished round.
    last_aggregate: (D,) the update applied last, or None.
    attack_state: what the attack keeps between malicious rounds.
    trigger_state: what a learnt trigger has become; the evaluator's trigger has it, too.
    start_round: rounds already played (a resumed run counts on from here).
    on_round: called with the record of each finished round, before the next begins.
    """

    def __init__(
        self,
        config: Config,
        plan: list[RoundPlan],
        layout: Layout,
        global_vector: Tensor,
        sizes: list[int],
        stages: list[Defense],
        *,
        attack: Attack | None,
        measure: Callable[[Tensor, list[Defense], Server | None], Measurement],
        on_round: Callable[[RoundRecord], None],
        serve: Callable[[int], Server] | None = None,
        trigger: Trigger | None = None,
        trigger_state: State | None = None,
        honest: bool = False,
        start_round: int = 0,
    ) -> None:
        self.config, self.plan, self.layout = config, plan, layout
        self.global_vector, self.sizes, self.stages = global_vector, sizes, stages
        self.attack, self.measure, self.on_round = attack, measure, on_round
        self.honest, self.start_round = honest, start_round
        self.serve, self.trigger = serve, trigger
        self.trigger_state = {} if trigger_state is None else trigger_state
        self.last_aggregate: Tensor | None = None
        self.attack_state: State = {}
        self._nodes: list[int] = []
        self._server: Server | None = None
        self._matrix: Tensor | None = None
        self._started = 0.0
        self._record: RoundRecord | None = None

    # ------------------------------------------------------------------------------- Flower's five hooks

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per replying client; they share one ArrayRecord."""
        self._started = time.perf_counter()
        plan = self.plan[server_round + self.start_round - 1]
        self._find_nodes(grid)
        self._server = None if self.serve is None else self.serve(plan.round)
        sent = self.global_vector
        for stage in self.stages:
            if type(stage).broadcast is not Defense.broadcast:
                sent = stage.broadcast(sent, require(stage, self._server))
                if sent.shape != self.global_vector.shape or not bool(torch.isfinite(sent).all()):
                    raise RunError(f"round {plan.round}, defense {stage.name!r}: broadcast made an unusable model")
        if sent is not self.global_vector:
            self.global_vector = sent
            arrays = to_record(sent)
        if self.trigger is not None and self.trigger.learnt() and not self.honest:
            self._optimise(plan, arrays, grid)
        return [self._message(plan, client, arrays) for client in plan.replying]

    def _message(self, plan: RoundPlan, client: int, arrays: ArrayRecord, *, optimise: bool = False) -> Message:
        return Message(
            self._content(plan, client, arrays, optimise),
            dst_node_id=self._nodes[client],
            message_type=MessageType.TRAIN,
            group_id=str(plan.round),
        )

    def _optimise(self, plan: RoundPlan, arrays: ArrayRecord, grid: Grid) -> None:
        """Let the first of the colluders improve the trigger, before any of them trains with it."""
        colluders = sorted((number, c) for c, number in plan.malicious.items() if c in plan.replying)
        if not colluders or self.trigger is None:
            return
        client = colluders[0][1]
        for reply in grid.send_and_receive([self._message(plan, client, arrays, optimise=True)]):
            if reply.has_error():
                if reply.error.code != ErrorCode.CLIENT_APP_CRASHED:
                    raise RunError(f"round {plan.round}, client {client} failed:\n{reply.error.reason}")
                return  # its worker died, more than once: the trigger stays as it is
            self.trigger_state = unpack_state(reply.content, "trigger")
        self._use_trigger()

    def _use_trigger(self) -> None:
        """Give the evaluator's trigger the current state, on the model's device."""
        if self.trigger is not None:
            self.trigger.state = self.trigger_state

    def _find_nodes(self, grid: Grid) -> list[int]:
        """The node of every client: the ascending node ids, fixed once all have registered.

        Raises
        ------
        RunError: fewer nodes than clients have registered in time.
        """
        clients, deadline = self.config.federation.clients, time.monotonic() + _REGISTRATION_SECONDS
        while len(self._nodes) < clients:
            self._nodes = sorted(grid.get_node_ids())
            if len(self._nodes) < clients and time.monotonic() > deadline:
                raise RunError(f"the grid has {len(self._nodes)} nodes; federation.clients is {clients}")
            if len(self._nodes) < clients:
                time.sleep(0.1)
        return self._nodes

    def _content(self, plan: RoundPlan, client: int, arrays: ArrayRecord, optimise: bool) -> RecordDict:
        malicious = client in plan.malicious and not self.honest
        content = RecordDict()
        if malicious:
            content = RecordDict({**pack_state(self.attack_state), **pack_state(self.trigger_state, "trigger")})
        content["arrays"] = arrays
        content["config"] = ConfigRecord(
            {
                "round": plan.round,
                "client": client,
                "malicious": malicious,
                "attacker": plan.malicious.get(client, 0),
                "participants": len(plan.replying),
                "total-examples": sum(self.sizes[c] for c in plan.replying),
                "optimise": optimise,
            }
        )
        if malicious and Knowledge.LAST_AGGREGATE in self._sees() and self.last_aggregate is not None:
            content["last-aggregate"] = to_record(self.last_aggregate)
        return content

    def _sees(self) -> frozenset[Knowledge]:
        return frozenset() if self.attack is None else self.attack.knowledge(self.attack.parameters)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Replies to (N, D), the colluders' coordination, the defense, the new global model."""
        trained = time.perf_counter()
        plan = self.plan[server_round + self.start_round - 1]
        client_of = {node: client for client, node in enumerate(self._nodes)}
        answered = {client_of[reply.metadata.src_node_id]: reply for reply in replies}
        by_client = {client: answered[client] for client in plan.replying if client in answered}
        rows, records, metrics = self._collect(plan, by_client)
        seconds = {"train": trained - self._started, **metrics}
        note = "" if rows else "no usable reply: the model stays"
        if rows:
            note = self._move(plan, rows, records)
        seconds["aggregate"] = time.perf_counter() - trained
        ordered = [records[client] for client in sorted(records)]
        self._record = RoundRecord(plan.round, ordered, seconds=seconds, note=note)
        return to_record(self.global_vector), None

    def _move(self, plan: RoundPlan, rows: list[int], records: dict[int, ClientRecord]) -> str:
        """Move the model by what the defense makes of the updates; what there is to say of it, or ""."""
        try:
            aggregation = self._aggregate(plan, rows, records)
        except TooFewClients as error:
            for client in rows:
                records[client] = replace(records[client], update_norm=None, reason="too few clients for the defense")
            return f"{error}; the model stays"
        self.last_aggregate = aggregation.vector * self.config.federation.server_lr
        self.global_vector = self.global_vector + self.last_aggregate
        self._note(records, rows, aggregation)
        return "" if bool(aggregation.accepted.any()) else "the defense accepts nobody: the model stays"

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: the model is measured at the server (see :meth:`evaluate`)."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        """Nothing to log: the run directory says more."""

    # ------------------------------------------------------------------------------------ the round's end

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower's ``evaluate_fn``: measure the new global model and hand over the round's record."""
        if server_round == 0:
            return None
        assert self._record is not None
        record, number = self._record, server_round + self.start_round
        every, last = self.config.evaluation.every, len(self.plan)
        if number % every == 0 or number == last:
            started = time.perf_counter()
            self._use_trigger()
            record.measurement = self.measure(self.global_vector, self.stages, self._server)
            record.seconds["evaluate"] = time.perf_counter() - started
        self.on_round(record)
        return None

    # --------------------------------------------------------------------------------------------- inside

    def _collect(
        self, plan: RoundPlan, replies: dict[int, Message]
    ) -> tuple[list[int], dict[int, ClientRecord], dict[str, float]]:
        """Lay the usable replies into the matrix; say of every client what became of it.

        Returns the clients behind the rows, the records by client, and the seconds of the slowest client.
        """
        records = {c: ClientRecord(c, self._is_malicious(plan, c), self.sizes[c], "dropped") for c in plan.dropped}
        for c in plan.stragglers:
            records[c] = ClientRecord(c, self._is_malicious(plan, c), self.sizes[c], "straggler")
        shape = (len(replies), self.layout.size)
        if self._matrix is None or self._matrix.shape[0] < shape[0]:
            self._matrix = torch.empty(shape, dtype=self.global_vector.dtype, device=self.global_vector.device)
        for c in set(plan.replying) - set(replies):
            malicious = self._is_malicious(plan, c)
            records[c] = ClientRecord(c, malicious, self.sizes[c], "failed", reason="no reply in time")
        rows: list[int] = []
        states: dict[int, State] = {}
        client_seconds: list[float] = []
        attack_seconds: dict[str, float] = {}
        for client, reply in replies.items():
            malicious = self._is_malicious(plan, client)
            if reply.has_error():
                if reply.error.code != ErrorCode.CLIENT_APP_CRASHED:
                    raise RunError(f"round {plan.round}, client {client} failed:\n{reply.error.reason}")
                reason = reply.error.reason or "its worker died"
                records[client] = ClientRecord(client, malicious, self.sizes[client], "failed", reason=reason)
                continue
            examples, reason = self._read(reply, client, self._matrix[len(rows)])
            if malicious and not reason:
                try:
                    states[plan.malicious[client]] = unpack_state(reply.content)
                except ValueError as error:
                    reason = f"unusable reply: {error}"
            if reason:
                records[client] = ClientRecord(client, malicious, examples, "rejected", reason=reason)
                continue
            rows.append(client)
            records[client] = ClientRecord(client, malicious, examples)
            metrics = reply.content["metrics"]
            client_seconds.append(_number(metrics.get("seconds")))
            if malicious:
                for name, value in metrics.items():
                    if name.startswith("attack-"):
                        attack_seconds[name.replace("-", "_")] = _number(value)
                attack_seconds["malicious_client"] = client_seconds[-1]
        if states and self.attack is not None:
            self.attack_state = self.attack.merge([states[number] for number in sorted(states)])
        slowest = {"slowest_client": max(client_seconds)} if client_seconds else {}
        return rows, records, {**slowest, **attack_seconds}

    def _is_malicious(self, plan: RoundPlan, client: int) -> bool:
        return client in plan.malicious and not self.honest

    def _read(self, reply: Message, client: int, row: Tensor) -> tuple[int, str]:
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
        torch.sub(local.to(row.device, row.dtype), self.global_vector, out=row)
        largest = max(abs(float(end)) for end in torch.aminmax(row))  # one pass; NaN spreads
        if not math.isfinite(largest):
            return examples, "an update that is not finite"
        if largest > _LARGEST:
            return examples, f"an update beyond measure, with an entry of {largest:.1e}"
        return examples, ""

    def _aggregate(self, plan: RoundPlan, rows: list[int], records: dict[int, ClientRecord]) -> Aggregation:
        assert self._matrix is not None
        updates = self._matrix[: len(rows)]
        device, dtype = updates.device, updates.dtype
        examples = torch.tensor([records[c].examples for c in rows], dtype=dtype, device=device)
        malicious = torch.tensor([self._is_malicious(plan, c) for c in rows], device=device)
        if self.attack is not None and bool(malicious.any()):
            updates = self._coordinate(plan, rows, updates, malicious, examples)
        weights = examples.clone() if self.config.federation.weighting == "examples" else torch.ones_like(examples)
        round = RoundUpdates(
            updates=updates,
            num_examples=examples,
            global_vector=self.global_vector,
            weights=weights,
            accepted=torch.ones(len(rows), dtype=torch.bool, device=device),
            trainable=self.layout.trainable,
            clients=tuple(rows),
            round=plan.round,
            seed=self.config.seed,
            layout=self.layout,
            server=self._server,
        )
        self._norms = torch.linalg.vector_norm(updates, dim=1)
        return apply_pipeline(self.stages, round)

    def _coordinate(
        self, plan: RoundPlan, rows: list[int], updates: Tensor, malicious: Tensor, examples: Tensor
    ) -> Tensor:
        """Let colluders act together; they see benign rows only if they declared it."""
        assert self.attack is not None
        if type(self.attack).coordinate is Attack.coordinate:
            return updates
        visible = Knowledge.BENIGN_UPDATES in self.attack.knowledge(self.attack.parameters)
        shown = updates if visible else torch.where(malicious[:, None], updates, torch.full_like(updates, torch.nan))
        knowledge = CoordinationKnowledge(
            round=plan.round,
            malicious=malicious,
            global_vector=self.global_vector,
            num_examples=examples,
            generator=streams.generator(self.config.seed, "coordinate", plan.round, device=updates.device),
            benign_visible=visible,
            clients=tuple(rows),
            attackers=tuple(plan.malicious[c] for c in rows if self._is_malicious(plan, c)),
            layout=self.layout,
            last_aggregate=self.last_aggregate if Knowledge.LAST_AGGREGATE in self._sees() else None,
            state=self.attack_state,
        )
        made = self.attack.coordinate(shown.clone(), knowledge)
        if made.shape != updates.shape or not bool(torch.isfinite(made[malicious]).all()):
            raise RunError(f"attack {self.attack.name!r}: coordinate returned unusable updates")
        return torch.where(malicious[:, None], made, updates)

    def _note(self, records: dict[int, ClientRecord], rows: list[int], aggregation: Aggregation) -> None:
        norms, weights = self._norms.tolist(), aggregation.weights.tolist()
        accepted = aggregation.accepted.tolist()
        scores = {name: value.tolist() for name, value in aggregation.scores.items()}
        for i, client in enumerate(rows):
            before = records[client]
            records[client] = ClientRecord(
                client,
                before.malicious,
                before.examples,
                "ok",
                update_norm=norms[i],
                accepted=accepted[i],
                weight=weights[i],
                scores={name: values[i] for name, values in scores.items()},
            )


def _number(value: Any) -> float:
    """A metric that a client reports about itself, as far as it is a number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
