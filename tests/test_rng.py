"""Random streams: a sample's draws depend on seed, id and restart, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robplug.errors import InputError
from robplug.isolation import global_numbers
from robplug.rng import Rng

LIKE = torch.empty((), dtype=torch.float64)
DRAWS = {
    "uniform": lambda rng: rng.uniform((2, 3), -1.0, 3.0, like=LIKE),
    "normal": lambda rng: rng.normal((2, 3), like=LIKE),
    "exponential": lambda rng: rng.exponential((2, 3), like=LIKE),
    "integers": lambda rng: rng.integers(1000, (2, 3)),
}
each_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


def test_the_numbers_are_those_of_numpys_philox():
    """Frozen: other numbers here change the results of every stored run."""
    stream = np.random.Generator(np.random.Philox(key=[5, 7], counter=[0, 0, 0, 2]))

    got = Rng(5, [3, 7], restart=2).uniform((4,), like=LIKE)

    assert got[1].tolist() == stream.random(4).tolist()
    assert Rng(0, [0]).uniform((2,), like=LIKE)[0].tolist() == pytest.approx(
        [0.011546754286, 0.241549196563], abs=1e-11
    )


@each_draw
@given(
    seed=st.integers(0, 2**63 - 1),
    ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=5),
    restart=st.integers(0, 9),
)
def test_a_sample_draws_the_same_in_any_company(draw, seed, ids, restart):
    together = draw(Rng(seed, ids, restart))

    for row, one in enumerate(ids):
        assert torch.equal(together[row], draw(Rng(seed, [one], restart))[0])


def test_large_seeds_keep_all_their_bits():
    results = [Rng(2**63 + step, [1]).normal((3,), like=LIKE) for step in (0, 1, 2**63 - 2, 2**63 - 1)]

    for row, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:row])


@each_draw
def test_seed_id_restart_and_time_each_change_the_numbers(draw):
    rng = Rng(1, [2])
    results = [draw(rng), draw(rng), draw(Rng(2, [2])), draw(Rng(1, [3])), draw(rng.at_restart(1)), draw(Rng(2, [1]))]

    for row, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:row])


@each_draw
def test_selected_streams_go_on_where_they_are(draw):
    rng, same = Rng(0, [4, 5, 6]), Rng(0, [4, 5, 6])
    first = draw(rng)
    part = rng.select(torch.tensor([True, False, True]))
    second = draw(part)

    assert torch.equal(draw(same), first)
    assert torch.equal(draw(same)[[0, 2]], second)
    assert (part.ids, len(part), part.seed, part.restart) == ((4, 6), 2, 0, 0)


@each_draw
def test_the_shared_stream_is_the_same_in_every_batch_and_goes_on_in_selections(draw):
    rng, other = Rng(0, [4, 5, 6]), Rng(0, [9])
    expected = [draw(other.shared()) for _ in range(3)]
    got = [draw(rng.shared()), draw(rng.select(torch.tensor([False, True, False])).shared()), draw(rng.shared())]

    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))
    assert expected[0].shape == (1, 2, 3) and not torch.equal(expected[0], expected[1])
    assert torch.equal(draw(rng), draw(Rng(0, [4, 5, 6])))  # the samples' own streams are not touched
    assert not torch.equal(draw(Rng(0, [4], restart=1).shared()), expected[0])
    assert torch.equal(draw(Rng(0, []).shared()), expected[0])


def test_a_restart_begins_anew_whatever_was_drawn_before():
    rng = Rng(0, [1, 2])
    rng.normal((5,), like=LIKE)

    assert torch.equal(rng.at_restart(3).normal((5,), like=LIKE), Rng(0, [1, 2], 3).normal((5,), like=LIKE))


@each_draw
def test_no_samples_give_no_numbers(draw):
    assert draw(Rng(0, [])).shape == (0, 2, 3)
    assert draw(Rng(0, [1, 2]).select(torch.tensor([False, False]))).shape == (0, 2, 3)


def test_draws_have_the_shape_dtype_range_and_moments_that_they_say():
    rng = Rng(0, range(50))

    uniform = rng.uniform((100,), -1.0, 3.0, like=torch.empty((), dtype=torch.float32))
    assert (uniform.shape, uniform.dtype) == ((50, 100), torch.float32)
    assert uniform.min() >= -1 and uniform.max() < 3 and uniform.mean() == pytest.approx(1.0, abs=0.06)
    normal = rng.normal((100,), like=LIKE)
    assert normal.mean() == pytest.approx(0.0, abs=0.06) and normal.std() == pytest.approx(1.0, abs=0.04)
    exponential = rng.exponential((100,), like=LIKE)
    assert exponential.min() >= 0 and exponential.mean() == pytest.approx(1.0, abs=0.06)
    integers = rng.integers(3)
    assert (integers.shape, integers.dtype) == ((50,), torch.int64)
    assert set(integers.tolist()) == {0, 1, 2}
    assert rng.uniform((), like=LIKE).shape == (50,)


def test_each_call_of_an_export_has_streams_of_its_own_and_exports_repeat():
    def calls(seed):
        rng = Rng(seed, [0])
        return [rng.next_call(2).normal((3,), like=LIKE) for _ in range(3)]

    first = calls(0)
    assert all(torch.equal(one, other) for one, other in zip(first, calls(0), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(first, calls(1), strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_the_batch_seed_depends_on_seed_ids_and_restart():
    seeds = [Rng(0, [1, 2]), Rng(1, [1, 2]), Rng(0, [2, 1]), Rng(0, [1]), Rng(0, [1, 2], 1)]

    assert len({rng.batch_seed() for rng in seeds}) == len(seeds)
    assert Rng(0, [1, 2]).batch_seed() == seeds[0].batch_seed()
    assert 0 <= seeds[0].batch_seed() < 2**64


def test_the_global_generators_are_left_alone():
    before = global_numbers()
    for draw in DRAWS.values():
        draw(Rng(0, [1]))
    assert global_numbers() == before


@pytest.mark.parametrize(("seed", "ids"), [(-1, [0]), (0, [0, -3])])
def test_negative_seeds_and_ids_are_refused(seed, ids):
    with pytest.raises(InputError, match=r"seed >= 0 and sample ids >= 0, got"):
        Rng(seed, ids)
