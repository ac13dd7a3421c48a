"""Clustering of clients: scikit-learn's algorithms, made to give a defined answer for every round.

scikit-learn takes a second to import, so the functions that need it import it.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def compact(rows: Tensor, *, center: bool = False) -> Tensor:
    """(N, ≤ N) float64: rows with the same lengths, distances and angles as those of (N, D).

    The R of a QR decomposition of the transposed matrix, built block by block; every row keeps its own
    digits, however huge another is. ``center`` subtracts the mean row first. O(N²·D) time, O(N²) memory and
    a block of columns.
    """
    n = rows.shape[0]
    triangle = torch.zeros(0, n, dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, max(n, 2**22 // max(n, 1)), dim=1):
        block = part.to(torch.float64)
        if center:
            block = block - block[:1]  # first, so that equal rows become exact zeros
            block = block - block.mean(dim=0)
        triangle = torch.linalg.qr(torch.cat([triangle, block.T]), mode="r").R
    return triangle.T.contiguous()


def seed_of(generator: torch.Generator) -> int:
    """A seed for NumPy and scikit-learn, drawn from the round's stream."""
    return int(torch.randint(2**31 - 1, (1,), generator=generator, device=generator.device))


def hdbscan(distances: Tensor, min_cluster_size: int, *, min_samples: int = 1, single: bool = True) -> Tensor:
    """(N,) labels of HDBSCAN from distances (N, N); −1 is noise. single: whether one cluster may be all there is.

    ``min_samples`` is as the hdbscan package counts; scikit-learn, which counts the point itself, gets one more.
    Without any distance between them, or when there is only one, all clients are one cluster.
    """
    n = distances.shape[0]
    if n < 2 or not bool((distances > 0).any()):
        return torch.zeros(n, dtype=torch.int64, device=distances.device)
    from sklearn.cluster import HDBSCAN

    method = HDBSCAN(
        min_cluster_size=max(2, min_cluster_size),
        min_samples=min(min_samples + 1, n),
        metric="precomputed",
        allow_single_cluster=single,
        copy=True,
    )
    with np.errstate(all="ignore"):  # equal clients: densities are infinite
        labels = method.fit(distances.double().cpu().numpy()).labels_
    return torch.as_tensor(labels, dtype=torch.int64, device=distances.device)


def mean_shift(features: Tensor, quantile: float = 0.5) -> Tensor:
    """(N,) labels of mean shift over features (N, F), seeded on a grid; −1 is far from every centre.

    The bandwidth is the mean distance to the furthest of the ⌊quantile · N⌋ nearest rows (the row itself
    counts), at least 10⁻⁶: below that rows are equal.
    """
    from sklearn.cluster import MeanShift, estimate_bandwidth

    rows = features.double().cpu().numpy()
    bandwidth = max(float(estimate_bandwidth(rows, quantile=quantile)), 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every row may be a seed of its own: that is no news
        try:
            labels = MeanShift(bandwidth=bandwidth, bin_seeding=True, cluster_all=False).fit(rows).labels_
        except ValueError:  # no row lies within the bandwidth of a grid point: the rows themselves are the seeds
            labels = MeanShift(bandwidth=bandwidth, cluster_all=False).fit(rows).labels_
    return torch.as_tensor(labels, dtype=torch.int64, device=features.device)


def largest_cluster(labels: Tensor) -> Tensor:
    """(N,) bool: the members of the largest cluster, of equal ones the lowest label; all False if all are −1."""
    clustered = labels >= 0
    if not bool(clustered.any()):
        return clustered
    sizes = torch.bincount(labels[clustered]).tolist()
    return labels == sizes.index(max(sizes))


def kmeans(points: Array, k: int, *, seed: int = 0, init: Any = "k-means++", tol: float = 1e-4) -> tuple[Array, float]:
    """Labels (n,) and the sum of squared distances to the centres; given centres are started from once."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(k, init=init, n_init=10 if isinstance(init, str) else 1, tol=tol, random_state=seed)
    with warnings.catch_warnings():  # equal points leave clusters empty, which is a result as good as another
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(points)
    return np.asarray(model.labels_), float(model.inertia_)


def agglomerative(points: Array, k: int) -> Array:
    """Labels (n,) of the points (n, F) joined, nearest first by Ward's criterion, until k clusters are left."""
    from sklearn.cluster import AgglomerativeClustering

    return np.asarray(AgglomerativeClustering(n_clusters=k).fit_predict(points))


def count_clusters(points: Array, *, most: int, references: int, seed: int) -> int:
    """How many clusters the points (n, F) form, by the gap statistic (Tibshirani et al. 2001).

    Gap(k) = mean over the references of ln W*(k) − ln W(k), W the sum of squares within the clusters of
    k-means and the references uniform in the points' box; the first k with Gap(k) ≥ Gap(k + 1) − s(k + 1).
    """
    most = min(most, len(np.unique(points, axis=0)))
    if most < 2:
        return 1
    draw = np.random.default_rng(seed)
    boxes = draw.uniform(points.min(axis=0), points.max(axis=0), size=(references, *points.shape))

    def log_within(data: Array) -> Array:
        within = np.array([kmeans(data, k, seed=seed)[1] for k in range(1, most + 1)])
        return np.asarray(np.log(np.maximum(within, 1e-12 * max(within[0], np.finfo(float).tiny / 1e-12))))

    expected = np.stack([log_within(box) for box in boxes])
    gap = expected.mean(axis=0) - log_within(points)
    error = expected.std(axis=0) * np.sqrt(1 + 1 / references)
    for k in range(1, most):
        if gap[k - 1] >= gap[k] - error[k]:
            return k
    return most
