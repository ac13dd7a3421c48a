"""Named random streams: a name is one stream, another name is another."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.streams import derive, generator, numpy_generator

NAMES = st.lists(st.integers(-5, 10**6) | st.text(max_size=6), max_size=4).map(tuple)


def test_these_seeds_are_what_runs_depend_on():
    """Written down: another value here makes every published run another one."""
    assert derive(0) == 2033344993903900207
    assert derive(1, "sample", 2) == 2816484392522076280
    assert derive(7, "client", 3, 11) == 5789220175276737178


@given(st.integers(0, 2**62), NAMES)
def test_a_seed_has_63_bits(seed, name):
    assert 0 <= derive(seed, *name) < 2**63
    assert derive(seed, *name) == derive(seed, *name)


@given(st.tuples(st.integers(0, 50), NAMES), st.tuples(st.integers(0, 50), NAMES))
def test_different_names_are_different_streams(one, two):
    same = one[0] == two[0] and [(type(p), p) for p in one[1]] == [(type(p), p) for p in two[1]]
    if not any(isinstance(part, str) and "/" in part for part in (*one[1], *two[1])):
        assert (derive(one[0], *one[1]) == derive(two[0], *two[1])) == same


def test_a_number_and_its_text_are_two_names():
    assert derive(0, "round", 1) != derive(0, "round", "1")
    assert derive(0, 1, 2) != derive(0, 12)
    assert derive(0, "a", "b") != derive(0, "ab")


def test_generators_repeat_and_do_not_touch_the_global_ones():
    torch.manual_seed(1)
    np_state = np.random.get_state()[1].tolist()  # noqa: NPY002
    torch_state = torch.random.get_rng_state()
    one, two = (torch.rand(5, generator=generator(3, "client", 4)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.rand(5, generator=generator(3, "client", 5)))
    first, second = (numpy_generator(3, "sample").random(5) for _ in range(2))
    assert (first == second).all()
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == np_state  # noqa: NPY002


def test_streams_of_neighbouring_names_are_unrelated():
    draws = np.stack([numpy_generator(0, "sample", number).standard_normal(200) for number in range(60)])
    correlations = np.corrcoef(draws)[np.triu_indices(60, 1)]
    assert abs(correlations).max() < 0.35
    assert abs(correlations.mean()) < 0.01
