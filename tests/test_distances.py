"""Distances against brute force, and where the usual shortcuts lose digits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsim import distances


@pytest.fixture(autouse=True, params=[7, 8192], ids=["many blocks", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(distances, "BLOCK", request.param)
    return int(request.param)


def rows(n: int = 6, d: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_brute_force(dtype: torch.dtype) -> None:
    x, base = rows(dtype=dtype), rows(1, dtype=dtype)[0] + 1
    wide, origin = x.double(), base.double()
    difference = wide[:, None] - wide[None]
    whole = wide + origin
    unit = whole / whole.norm(dim=1, keepdim=True)
    weights = torch.arange(1.0, 7.0) / 21
    for name, found, expected in [
        ("norms", distances.norms(x), wide.norm(dim=1)),
        ("norms, p=1", distances.norms(x, p=1), wide.abs().sum(dim=1)),
        ("norms of whole weights", distances.norms(x, base), whole.norm(dim=1)),
        ("squared", distances.squared_distances(x), difference.square().sum(dim=2)),
        ("manhattan", distances.manhattan_distances(x), difference.abs().sum(dim=2)),
        ("cosine", distances.cosine_distances(x, base), 1 - unit @ unit.T),
        ("cosine to base", distances.cosine_distances_to_base(x, base), 1 - unit @ (origin / origin.norm())),
        ("to mean", distances.distances_to_mean(x, weights), (wide - weights.double() @ wide).norm(dim=1)),
    ]:
        assert found.dtype == torch.float64, name
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13, msg=name)


def test_columns_cover_the_matrix_as_views() -> None:
    x = rows()
    blocks = list(distances.columns(x))
    assert torch.equal(torch.cat(blocks, dim=1), x)
    assert blocks[0].data_ptr() == x.data_ptr()


def test_equal_rows_are_exactly_zero_apart_and_the_matrix_is_symmetric() -> None:
    x = rows()
    x[3] = x[1]
    for matrix in (
        distances.squared_distances(x),
        distances.manhattan_distances(x),
        distances.cosine_distances(x),
    ):
        assert matrix[1, 3] == 0
        assert torch.equal(matrix, matrix.T)
        assert torch.equal(matrix.diagonal(), torch.zeros(6, dtype=torch.float64))
        assert torch.equal(matrix[1], matrix[3])  # so that ties stay ties


def test_small_distances_survive_a_boosted_row() -> None:
    """Through the Gram matrix the distance of 1e-6 would vanish: 1e12 has no digits left for its square."""
    x = torch.ones(3, 40, dtype=torch.float64) * 1e5
    x[1, 0] += 1e-6
    expected = float(x[1, 0] - x[0, 0]) ** 2
    assert distances.squared_distances(x)[0, 1].item() == pytest.approx(expected, rel=1e-12)


def test_tiny_angles_keep_their_digits() -> None:
    """1 − cos of an angle of 1e-9 is 5e-19, which 1 − x cannot even represent."""
    x = torch.tensor([[1.0, 0.0], [1.0, 1e-9]], dtype=torch.float64)
    assert distances.cosine_distances(x)[0, 1].item() == pytest.approx(5e-19, rel=1e-9)
    zero = torch.zeros(2, dtype=torch.float64)
    to_base = distances.cosine_distances_to_base(x[1:] - x[0], x[0])
    assert to_base.item() == pytest.approx(5e-19, rel=1e-9)
    assert bool(torch.isfinite(distances.cosine_distances_to_base(x, zero)).all())


def test_zero_rows_have_finite_cosines() -> None:
    x = rows()
    x[0] = 0
    x[1] = 0
    matrix = distances.cosine_distances(x)
    assert matrix[0, 1] == 0
    assert matrix[0, 2] == pytest.approx(0.5)


def test_float32_sums_are_exact_to_float64() -> None:
    """A float32 sum over a million entries is off in the fourth digit."""
    x = torch.randn(1, 1_000_000, generator=torch.Generator().manual_seed(0))
    if distances.BLOCK > 7:
        assert distances.norms(x).item() == pytest.approx(x.double().norm().item(), rel=1e-12)


@pytest.mark.parametrize("n", [1, 2])
def test_few_rows(n: int) -> None:
    assert distances.squared_distances(rows(n)).shape == (n, n)
