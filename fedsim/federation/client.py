"""The Flower ClientApp: honest clients train, malicious ones run the attack.

A process keeps one :class:`ClientRuntime` — data, model, trigger, attack — and plays client after client with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedsim import plugins, streams
from fedsim.attack import Attack, AttackContext, CraftStep, Knowledge
from fedsim.batch import Batch, outputs_of
from fedsim.config import Config
from fedsim.data import Data
from fedsim.defense import Defense, HonestContext
from fedsim.federation.messages import pack_state, to_record, to_vector, unpack_state
from fedsim.layout import FlatModel
from fedsim.local import LocalSettings
from fedsim.tasks.base import Task
from fedsim.training import fit, learning_rate, malicious_update
from fedsim.trigger import Trigger


def honest_settings(config: Config, round: int) -> LocalSettings:
    """How an honest client trains in a round."""
    t = config.training
    return LocalSettings(
        lr=learning_rate(t.lr, t.lr_decay, round),
        epochs=t.local_epochs,
        batch_size=t.batch_size,
        momentum=t.momentum,
        weight_decay=t.weight_decay,
        steps=t.local_steps,
        lr_decay=t.lr_decay,
        amp=t.amp,
        channels_last=t.channels_last,
    )


def initial_module(config: Config, data: Data) -> torch.nn.Module:
    """The task's network with the run's initial weights (a function of the seed)."""
    task: Task = config.task.create()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.derive(config.seed, "model"))
        return task.module(config.task.model.create(), data)


class ClientRuntime:
    """Everything the clients of one process share; ``parts`` are the indices of every client's examples."""

    def __init__(self, config: Config, data: Data, parts: list[Tensor], device: torch.device) -> None:
        self.config, self.device = config, device
        self.data = data.to(device)
        self.parts = [part.to(device) for part in parts]
        self.task: Task = config.task.create()
        self.loss = self.task.loss()
        self.model = FlatModel(initial_module(config, data), device=device)
        self.attack: Attack | None = None
        self.trigger: Trigger | None = None
        self.craft: list[CraftStep] = []
        if config.attack is not None and config.attack.name != "none":
            cls: Any = plugins.get("attack", config.attack.name)
            self.attack = cls(config.attack.parameters)
            self.trigger = config.attack.trigger.create()
            assert self.trigger is not None
            self.trigger.prepare(data)
            self.craft = [step.create() for step in config.attack.craft]

        stages: list[Defense] = [stage.create() for stage in config.defense]
        self.client_side = [stage for stage in stages if stage.client_side()]

    def settings(self, round: int) -> LocalSettings:
        """How an honest client trains in a round."""
        return honest_settings(self.config, round)

    def attacker_settings(self, round: int) -> LocalSettings:
        """How a malicious client trains: as everybody, but for what the attack section says."""
        attack, t = self.config.attack, self.config.training
        assert attack is not None
        own = self.settings(round)
        says_how_long = attack.local_epochs is not None or attack.local_steps is not None
        return replace(
            own,
            lr=learning_rate(t.lr if attack.lr is None else attack.lr, t.lr_decay, round),
            epochs=own.epochs if attack.local_epochs is None else attack.local_epochs,
            steps=attack.local_steps if says_how_long else own.steps,
        )

    def batches(self, client: int, generator: torch.Generator) -> Callable[[], Iterator[Batch]]:
        t = self.config.training
        return self.task.epoch(self.data.train, self.parts[client], t.batch_size, generator, t.augment)

    def train(self, content: RecordDict, order: Mapping[str, Any]) -> RecordDict:
        """Play one client for one round; the reply holds its local model (D,) and metrics."""
        started = time.perf_counter()
        round, client = int(order["round"]), int(order["client"])
        global_vector = to_vector(content["arrays"]).to(self.device)
        self.model.load(global_vector)
        seed = self.config.seed
        seed_torch(streams.derive(seed, "torch", round, client), self.device)
        generator = streams.generator(seed, "client", round, client)
        batches = self.batches(client, generator)
        reply = RecordDict()
        metrics: dict[str, Any] = {"num-examples": len(self.parts[client])}
        if bool(order["malicious"]) and self.attack is not None:
            context = self._context(order, content, global_vector, batches, generator)
            assert self.trigger is not None
            self.trigger.state = unpack_state(content, "trigger")
            if order.get("optimise"):
                self.trigger.optimise(context)
                return pack_state(self.trigger.state, "trigger")
            vector = global_vector + malicious_update(self.attack, context, self.craft)
            metrics.update({f"attack-{name}": float(value) for name, value in context.metrics.items()})
            reply = pack_state(context.state)
        else:
            metrics["train-loss"], vector = self._honest(round, client, global_vector, batches, generator)
        reply["arrays"] = to_record(vector)
        metrics["seconds"] = time.perf_counter() - started
        reply["metrics"] = MetricRecord(metrics)
        return reply

    def _honest(
        self,
        round: int,
        client: int,
        global_vector: Tensor,
        batches: Callable[[], Iterator[Batch]],
        generator: torch.Generator,
    ) -> tuple[float, Tensor]:
        """Plain local training, with what the defense asks of honest clients: (training loss, local model (D,))."""
        settings = self.settings(round)
        if not self.client_side:
            return fit(self.model, batches, self.loss, settings), self.model.vector.clone()
        start = global_vector.clone()
        contexts = [
            HonestContext(self.model, start, batches, self.loss, settings, self.data.classes, generator, round, client)
            for _ in self.client_side
        ]
        sides = list(zip(self.client_side, contexts, strict=True))

        def transform(batch: Batch) -> Batch:
            for stage, context in sides:
                batch = stage.client_batch(batch, context)
            return batch

        def on_gradient(gradient: Tensor, weights: Tensor) -> None:
            for stage, context in sides:
                stage.client_gradient(gradient, weights, context)

        loss = fit(self.model, batches, self.loss, settings, transform=transform, on_gradient=on_gradient)
        update = self.model.vector - start
        for stage, context in sides:
            update = stage.client_update(update, context)
        return loss, start + update

    def _context(
        self,
        order: Mapping[str, Any],
        content: RecordDict,
        global_vector: Tensor,
        batches: Callable[[], Iterator[Batch]],
        generator: torch.Generator,
    ) -> AttackContext:
        config = self.config
        assert config.attack is not None
        assert self.attack is not None
        round, client = int(order["round"]), int(order["client"])
        sees = self.attack.knowledge(self.attack.parameters)
        aggregate = content.array_records.get("last-aggregate")
        return AttackContext(
            model=self.model,
            global_vector=global_vector.clone(),  # what arrives is shared memory, and a plugin may err
            batches=batches,
            loss=self.loss,
            settings=self.attacker_settings(round),
            benign=self.settings(round),
            fit=fit,
            trigger=self.trigger,
            poison_fraction=config.attack.poison_fraction,
            generator=generator,
            round=round,
            clients_per_round=int(order["participants"]),
            num_examples=len(self.parts[client]),
            total_examples=int(order["total-examples"]),
            attacker=int(order["attacker"]),
            state=unpack_state(content),
            benign_batches=(lambda count: self._benign_batches(count, round, client))
            if Knowledge.BENIGN_DATA in sees
            else None,
            last_aggregate=None if aggregate is None else to_vector(aggregate).to(self.device, copy=True),
            backdoor_accuracy=lambda: self._backdoor_accuracy(client, global_vector, generator),
        )

    def _benign_batches(self, count: int, round: int, client: int) -> Iterator[Batch]:
        """One clean epoch of each of ``count`` sampled other clients."""
        others = [c for c in range(len(self.parts)) if c != client]
        generator = streams.generator(self.config.seed, "benign data", round, client)
        drawn = torch.randperm(len(others), generator=generator)[:count]
        for index in drawn.tolist():
            yield from self.batches(others[index], generator)()

    def _backdoor_accuracy(self, client: int, global_vector: Tensor, generator: torch.Generator) -> float:
        """ASR of the global model on the attacker's own examples, triggered."""
        assert self.trigger is not None
        own = self.parts[client]
        own = own[self.trigger.usable(self.data.train.labels[own])]
        if len(own) == 0:
            return 0.0
        batch = self.task.batch(self.data.train, own)
        poisoned = self.trigger.poison(batch, len(own), generator=generator)
        kept = self.model.vector.clone()
        self.model.load(global_vector)
        self.model.module.eval()
        with torch.no_grad():
            outputs, _ = outputs_of(self.model.module, poisoned, None)
            right, total = self.trigger.succeeded(outputs, poisoned.labels)
        self.model.module.train()
        self.model.load(kept)
        return float(right / total)


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the generator that dropout draws from (``torch.manual_seed`` formats a stack trace for every absent GPU)."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def client_app(runtime: Callable[[Context], ClientRuntime]) -> ClientApp:
    """The ClientApp over whatever finds the process's runtime.

    A server that says no more than the round, as Flower's own strategies do, gets honest training of the client
    that the node's partition id names.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        said = message.content["config"]
        order: dict[str, Any] = {
            "round": said.get("server-round", 1),
            "client": context.node_config.get("partition-id"),
            "malicious": False,
            **said,
        }
        return Message(runtime(context).train(message.content, order), reply_to=message)

    return app
