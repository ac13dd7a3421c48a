"""The Flower Strategy: one round, from the plan to the new global model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim import streams
from fedsim.attack import Attack, CoordinationKnowledge, Knowledge
from fedsim.config import Config
from fedsim.defense import Defense, RoundUpdates, Server, require
from fedsim.errors import RunError
from fedsim.federation.evaluation import Measurement
from fedsim.federation.messages import pack_state, to_record, unpack_state
from fedsim.federation.records import RoundRecord
from fedsim.federation.replies import Replies, ReplyReader, beyond_measure, why_lost
from fedsim.federation.schedule import RoundPlan
from fedsim.layout import Layout
from fedsim.local import State
from fedsim.pipeline import Aggregation, TooFewClients, apply_pipeline
from fedsim.trigger import Trigger

_REGISTRATION_SECONDS = 60.0
"""How long the first round waits for nodes to register (with our own grids they are there at once)."""


class FederatedStrategy(Strategy):
    """Plays the plan: sends the model, lays the replies into one matrix, runs the defense, moves the model.

    Attributes
    ----------
    global_vector: (D,) the global model after the last finished round.
    last_aggregate: (D,) the update applied last, or None.
    attack_state: what the attack keeps between malicious rounds.
    trigger_state: what a learnt trigger has become; ``trigger``, the evaluator's, has it when the model is measured.
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
        self.config, self.layout = config, layout
        self.plan = [replace(round, malicious={}) for round in plan] if honest else plan
        self.global_vector, self.sizes, self.stages = global_vector, sizes, stages
        self.attack, self.measure, self.on_round = attack, measure, on_round
        self.serve, self.trigger, self.start_round = serve, trigger, start_round
        self.trigger_state = {} if trigger_state is None else trigger_state
        self.last_aggregate: Tensor | None = None
        self.attack_state: State = {}
        self._nodes: list[int] = []
        self._server: Server | None = None
        self._reader = ReplyReader(sizes, max((len(round.replying) for round in plan), default=0))
        self._started = 0.0
        self._record: RoundRecord | None = None

    # ------------------------------------------------------------------------------- Flower's five hooks

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per replying client; they share one ArrayRecord, malicious ones all that they are sent."""
        self._started = time.perf_counter()
        plan = self.plan[server_round + self.start_round - 1]
        self._find_nodes(grid)
        self._server = None if self.serve is None else self.serve(plan.round)
        if self._broadcast(plan):
            arrays = to_record(self.global_vector)
        if plan.malicious and self.trigger is not None and self.trigger.learnt():
            self._optimise(plan, arrays, grid)
        inside = self._for_colluders() if plan.malicious else RecordDict()
        return [self._message(plan, client, arrays, inside) for client in plan.replying]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Replies to (N, D), the colluders' coordination, the defense, the new global model."""
        trained = time.perf_counter()
        plan = self.plan[server_round + self.start_round - 1]
        client_of = {node: client for client, node in enumerate(self._nodes)}
        answered = {client_of[reply.metadata.src_node_id]: reply for reply in replies}
        read = self._reader.read(plan, answered, self.global_vector)
        if read.states and self.attack is not None:
            self.attack_state = self.attack.merge(read.states)
        note = self._move(plan, read) if read.clients else "no usable reply: the model stays"
        seconds = {"train": trained - self._started, **read.seconds, "aggregate": time.perf_counter() - trained}
        ordered = [read.records[client] for client in sorted(read.records)]
        self._record = RoundRecord(plan.round, ordered, seconds=seconds, note=note)
        return to_record(self.global_vector), None

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
            if self.trigger is not None:
                self.trigger.state = self.trigger_state
            record.measurement = self.measure(self.global_vector, self.stages, self._server)
            record.seconds["evaluate"] = time.perf_counter() - started
        self.on_round(record)
        return None

    # ---------------------------------------------------------------------------------- before the clients

    def _find_nodes(self, grid: Grid) -> None:
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

    def _broadcast(self, plan: RoundPlan) -> bool:
        """Put what the defense sends out in place of the global model; whether it sends anything else.

        Raises
        ------
        RunError: a stage made something that is no model.
        """
        sent = self.global_vector
        for stage in self.stages:
            if type(stage).broadcast is not Defense.broadcast:
                sent = stage.broadcast(sent, require(stage, self._server))
                if sent.shape != self.global_vector.shape or not bool(torch.isfinite(sent).all()):
                    raise RunError(f"round {plan.round}, defense {stage.name!r}: broadcast made an unusable model")
        if sent is self.global_vector:
            return False
        self.global_vector = sent.to(self.global_vector, copy=True)  # it may lie in the server's own network
        return True

    def _optimise(self, plan: RoundPlan, arrays: ArrayRecord, grid: Grid) -> None:
        """Let the first of the colluders improve the trigger, before any of them trains with it."""
        client = min(plan.malicious, key=lambda c: plan.malicious[c])
        for reply in grid.send_and_receive([self._message(plan, client, arrays, self._for_colluders(), optimise=True)]):
            if why_lost(reply, plan.round, client):
                return  # the trigger stays as it is
            self.trigger_state = unpack_state(reply.content, "trigger")

    def _for_colluders(self) -> RecordDict:
        """What each malicious client of a round is sent besides the model; one set of records for all of them."""
        inside = RecordDict({**pack_state(self.attack_state), **pack_state(self.trigger_state, "trigger")})
        if Knowledge.LAST_AGGREGATE in self._sees() and self.last_aggregate is not None:
            inside["last-aggregate"] = to_record(self.last_aggregate)
        return inside

    def _sees(self) -> frozenset[Knowledge]:
        return frozenset() if self.attack is None else self.attack.knowledge(self.attack.parameters)

    def _message(
        self, plan: RoundPlan, client: int, arrays: ArrayRecord, inside: RecordDict, *, optimise: bool = False
    ) -> Message:
        malicious = client in plan.malicious
        content = RecordDict(dict(inside) if malicious else {})
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
        return Message(
            content, dst_node_id=self._nodes[client], message_type=MessageType.TRAIN, group_id=str(plan.round)
        )

    # ------------------------------------------------------------------------------------------ after them

    def _move(self, plan: RoundPlan, read: Replies) -> str:
        """Move the model by what the defense makes of the updates; what there is to say of it, or ""."""
        self._coordinate(plan, read)
        norms = torch.linalg.vector_norm(read.updates, dim=1)
        try:
            aggregation = apply_pipeline(self.stages, self._round(plan, read))
        except TooFewClients as error:
            for client in read.clients:
                read.records[client] = replace(read.records[client], reason="too few clients for the defense")
            return f"{error}; the model stays"
        self.last_aggregate = aggregation.vector * self.config.federation.server_lr
        self.global_vector = self.global_vector + self.last_aggregate
        _note(read, norms, aggregation)
        return "" if bool(aggregation.accepted.any()) else "the defense accepts nobody: the model stays"

    def _coordinate(self, plan: RoundPlan, read: Replies) -> None:
        """Let colluders act together on their rows; they see benign rows only if they declared it.

        Raises
        ------
        RunError: they made something that is no update.
        """
        attack, malicious, updates = self.attack, read.malicious, read.updates
        if attack is None or type(attack).coordinate is Attack.coordinate or not bool(malicious.any()):
            return
        visible = Knowledge.BENIGN_UPDATES in self._sees()
        shown = updates.clone()
        if not visible:
            shown[~malicious] = torch.nan
        knowledge = CoordinationKnowledge(
            round=plan.round,
            malicious=malicious,
            global_vector=self.global_vector,
            num_examples=read.num_examples,
            generator=streams.generator(self.config.seed, "coordinate", plan.round, device=updates.device),
            benign_visible=visible,
            clients=tuple(read.clients),
            attackers=tuple(plan.malicious[client] for client in read.clients if client in plan.malicious),
            layout=self.layout,
            last_aggregate=self.last_aggregate if Knowledge.LAST_AGGREGATE in self._sees() else None,
            state=self.attack_state,
        )
        made = attack.coordinate(shown, knowledge)
        same = made.shape == updates.shape
        why = (
            beyond_measure(made[malicious])
            if same
            else f"their shape is {tuple(made.shape)}, not {tuple(updates.shape)}"
        )
        if why:
            raise RunError(f"attack {attack.name!r}: coordinate returned unusable updates: {why}")
        updates[malicious] = made[malicious].to(updates)

    def _round(self, plan: RoundPlan, read: Replies) -> RoundUpdates:
        """What the defense gets."""
        examples = read.num_examples
        by_examples = self.config.federation.weighting == "examples"
        return RoundUpdates(
            updates=read.updates,
            num_examples=examples,
            global_vector=self.global_vector,
            weights=examples.clone() if by_examples else torch.ones_like(examples),
            accepted=torch.ones(len(read.clients), dtype=torch.bool, device=read.updates.device),
            trainable=self.layout.trainable,
            clients=tuple(read.clients),
            round=plan.round,
            seed=self.config.seed,
            layout=self.layout,
            server=self._server,
        )


def _note(read: Replies, norms: Tensor, aggregation: Aggregation) -> None:
    """Write into the records of the rows what the defense made of them; norms: (N,)."""
    lengths, weights, accepted = norms.tolist(), aggregation.weights.tolist(), aggregation.accepted.tolist()
    scores = {name: value.tolist() for name, value in aggregation.scores.items()}
    for i, client in enumerate(read.clients):
        read.records[client] = replace(
            read.records[client],
            update_norm=lengths[i],
            accepted=accepted[i],
            weight=weights[i],
            scores={name: values[i] for name, values in scores.items()},
        )
