"""How the training data is split over the clients, through the partitioners of flwr-datasets."""

from __future__ import annotations

import contextlib
import io
import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.batch import IGNORE, Examples
from fedsim.errors import InputError
from fedsim.plugins import Parameters, Plugin, parameter, register
from fedsim.streams import derive, numpy_generator


class Partition(Plugin):
    """A way to split data; ``split`` gives every client its examples."""

    kind: ClassVar[str] = "partition"
    by_label: ClassVar[bool] = False
    """Whether it goes by the examples' labels: each has to have exactly one."""
    remedy: ClassVar[str] = "use fewer clients, or more data"
    """What to do where some client gets too little."""

    @abstractmethod
    def partitioner(self, examples: Examples, clients: int, seed: int) -> Any:
        """The flwr-datasets partitioner to use (its ``partition_by`` column is ``label`` or ``user``).

        There is no column ``label`` where an example has several labels (next word).
        """

    def split(self, examples: Examples, clients: int, seed: int) -> list[Tensor]:
        """Indices of every client's examples, int64, ascending.

        Raises
        ------
        InputError: the split is impossible, or leaves a client without examples.
        """
        import datasets  # slow to import, and only needed to split

        single = examples.labels.ndim == 1
        if self.by_label and not single:
            raise InputError(
                f"federation.partition {self.name!r} needs one label for every example; use natural, iid or quantity"
            )
        if len(examples) < clients:
            raise InputError(
                f"federation.partition {self.name!r}: {len(examples)} examples cannot be split over {clients} clients; "
                f"use at most as many clients as examples"
            )
        columns: dict[str, Any] = {"index": np.arange(len(examples))}
        if single:
            columns["label"] = examples.labels.numpy()
        if examples.users is not None:
            columns["user"] = examples.users.numpy()
        partitioner = self.partitioner(examples, clients, derive(seed, "partition") % 2**31)
        partitioner.dataset = datasets.Dataset.from_dict(columns)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # progress bars, retries
            warnings.simplefilter("ignore")
            try:
                parts = [np.asarray(partitioner.load_partition(i)["index"][:]) for i in range(clients)]
            except ValueError as error:
                reason = " ".join(str(error).split())[:300].rstrip(".")
                raise InputError(
                    f"federation.partition {self.name!r} cannot split {len(examples)} examples over {clients} "
                    f"clients: {reason}; {self.remedy}"
                ) from None
        empty = [client for client, part in enumerate(parts) if len(part) == 0]
        if empty:
            raise InputError(
                f"federation.partition {self.name!r}: client {empty[0]} has no examples ({len(empty)} of {clients} "
                f"are empty); {self.remedy}"
            )
        return [torch.from_numpy(np.sort(part).astype(np.int64)) for part in parts]


@register("iid")
class Iid(Partition):
    """Every client draws evenly from all data."""

    def partitioner(self, examples: Examples, clients: int, seed: int) -> Any:
        from flwr_datasets import partitioner as fp

        return _Shuffled(fp.IidPartitioner(num_partitions=clients), seed)


class _Shuffled:
    """A partitioner over a shuffled data set (the IID one takes contiguous shards)."""

    def __init__(self, inner: Any, seed: int) -> None:
        self.inner, self.seed = inner, seed

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "dataset":
            self.inner.dataset = value.shuffle(seed=self.seed)
        else:
            super().__setattr__(name, value)

    def load_partition(self, index: int) -> Any:
        return self.inner.load_partition(index)


@dataclass(frozen=True)
class DirichletParameters(Parameters):
    alpha: float = parameter(1.0, "concentration: small is skewed, large is even", gt=0)
    min_examples: int = parameter(1, "least examples a client must get; the draw is repeated until it holds", ge=1)


@register("dirichlet")
class Dirichlet(Partition):
    """Label shares of every client follow a Dirichlet(α) draw."""

    paper = "Hsu et al., Measuring the Effects of Non-Identical Data Distribution, arXiv 1909.06335"
    Parameters = DirichletParameters
    by_label = True
    remedy = "use fewer clients, more data, a larger alpha, or a smaller min_examples"

    def partitioner(self, examples: Examples, clients: int, seed: int) -> Any:
        from flwr_datasets import partitioner as fp

        return fp.DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=self.parameters.alpha,
            min_partition_size=self.parameters.min_examples,
            self_balancing=False,
            shuffle=True,
            seed=seed,
        )


@dataclass(frozen=True)
class NaturalParameters(Parameters):
    min_examples: int = parameter(1, "leave out owners with fewer examples", ge=1)


@register("natural")
class Natural(Partition):
    """One client per natural owner (writer, author); more owners than clients: a seeded draw of them."""

    Parameters = NaturalParameters

    def split(self, examples: Examples, clients: int, seed: int) -> list[Tensor]:
        if examples.users is None:
            raise InputError(
                "federation.partition 'natural' needs an owner for every example; name its column in task.data.user"
            )
        owners, counts = torch.unique(examples.users, return_counts=True)
        owners = owners[counts >= self.parameters.min_examples]
        if len(owners) < clients:
            raise InputError(
                f"federation.partition 'natural': there are {len(owners)} owners with at least "
                f"{self.parameters.min_examples} examples; federation.clients is {clients}"
            )
        chosen = np.sort(numpy_generator(seed, "partition").permutation(owners.numpy())[:clients])
        mask = torch.isin(examples.users, torch.from_numpy(chosen))
        rows = torch.nonzero(mask).squeeze(1)
        kept = Examples(examples.inputs[:0], examples.labels[rows], examples.users[rows])
        return [rows[part] for part in super().split(kept, clients, seed)]

    def partitioner(self, examples: Examples, clients: int, seed: int) -> Any:
        from flwr_datasets import partitioner as fp

        return fp.NaturalIdPartitioner(partition_by="user")


@dataclass(frozen=True)
class PathologicalParameters(Parameters):
    classes_per_client: int = parameter(2, "classes a client holds", ge=1)


@register("pathological")
class Pathological(Partition):
    """Every client holds a few classes only; the examples of a class that no client drew are not used."""

    paper = "McMahan et al., Communication-Efficient Learning of Deep Networks, AISTATS 2017"
    Parameters = PathologicalParameters
    by_label = True
    remedy = "use fewer clients, more data, or another classes_per_client"

    def partitioner(self, examples: Examples, clients: int, seed: int) -> Any:
        from flwr_datasets import partitioner as fp

        return fp.PathologicalPartitioner(
            num_partitions=clients,
            partition_by="label",
            num_classes_per_partition=self.parameters.classes_per_client,
            class_assignment_mode="random",
            shuffle=True,
            seed=seed,
        )


@dataclass(frozen=True)
class QuantityParameters(Parameters):
    skew: str = parameter(
        "linear",
        "examples of client k, from 1, are in proportion to k, k² or exp(k)",
        choices=("linear", "square", "exponential"),
    )


@register("quantity")
class Quantity(Partition):
    """Clients hold unequal amounts of randomly drawn data; labels play no part. The last client has most."""

    Parameters = QuantityParameters
    remedy = "every client needs an example: use fewer clients, more data, or a milder skew"

    def partitioner(self, examples: Examples, clients: int, seed: int) -> Any:
        from flwr_datasets import partitioner as fp

        made = {
            "linear": fp.LinearPartitioner,
            "square": fp.SquarePartitioner,
            "exponential": fp.ExponentialPartitioner,
        }
        return _Shuffled(made[self.parameters.skew](num_partitions=clients), seed)


def describe(parts: list[Tensor], labels: Tensor, classes: int) -> dict[str, Any]:
    """Statistics of a split for the manifest.

    labels: (N,): sizes, and classes held per client. (N, T), next word: sizes, and labels that count per client.
    """
    sizes = np.array([len(part) for part in parts])
    described = {
        "clients": len(parts),
        "examples": int(sizes.sum()),
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes)),
        "largest": int(sizes.max()),
    }
    if labels.ndim > 1:
        counts = (labels != IGNORE).flatten(1).sum(1)
        targets = np.array([int(counts[part].sum()) for part in parts])
        return described | {
            "targets_per_client_smallest": int(targets.min()),
            "targets_per_client_median": float(np.median(targets)),
            "targets_per_client_largest": int(targets.max()),
        }
    shares = np.stack([np.bincount(labels[part].numpy(), minlength=classes) / len(part) for part in parts])
    return described | {
        "classes_per_client_mean": float((shares > 0).sum(1).mean()),
        "largest_class_share_mean": float(shares.max(1).mean()),
    }
