"""The in-process Grid: Flower's seam between a ServerApp and its nodes, without any transport."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable

from flwr.app import DEFAULT_TTL, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsim.federation.messages import identify

RUN_ID = 1


def node_context(node_id: int, nodes: int) -> Context:
    """The Context of a node; its partition is its place in the ascending list of node ids."""
    return Context(
        run_id=RUN_ID,
        node_id=node_id,
        node_config={"partition-id": node_id - 1, "num-partitions": nodes},
        state=RecordDict(),
        run_config={},
    )


def call(app: ClientApp, message: Message, nodes: int) -> Message:
    """One client's answer; an exception becomes a Flower error reply that carries the traceback."""
    try:
        return app(message, node_context(message.metadata.dst_node_id, nodes))
    except Exception:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, traceback.format_exc()), reply_to=message)


class LocalGrid(Grid):
    """Common to our grids: nodes 1 … ``nodes`` (client + 1), and messages numbered as they are sent."""

    def __init__(self, nodes: int) -> None:
        identify(RUN_ID)
        self.nodes = nodes
        self._run = Run.create_empty(run_id=RUN_ID)
        self._sent = 0
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl or DEFAULT_TTL, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.nodes + 1)

    def number(self, messages: Iterable[Message]) -> list[Message]:
        """The messages with ids, as a SuperLink would give them."""
        numbered = list(messages)
        for message in numbered:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)
        return numbered

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbered = self.number(messages)
        for message, reply in zip(numbered, self.answer(numbered), strict=True):
            self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in numbered]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.answer(self.number(messages))

    def answer(self, messages: list[Message]) -> list[Message]:
        """One reply per message, in the same order."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of whatever runs behind the grid."""


class InProcessGrid(LocalGrid):
    """Client after client in this process: for debugging, for one GPU, and needing no Ray."""

    def __init__(self, app: ClientApp, nodes: int, on_reply: Callable[[], None] | None = None) -> None:
        super().__init__(nodes)
        self.app = app
        self.on_reply = on_reply

    def answer(self, messages: list[Message]) -> list[Message]:
        replies = []
        for message in messages:
            replies.append(call(self.app, message, self.nodes))
            if self.on_reply is not None:
                self.on_reply()
        return replies
