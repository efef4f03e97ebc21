"""How tokens are chosen: the filters against a reference in NumPy, and random numbers that depend on the row alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.generation.sampling import Sampling, choose, filtered, penalised
from flm_jax.records import FieldError


def kept(logits, sampling):
    """Which tokens the filters keep, by sorting, as transformers' logits warpers do; in double precision."""
    x = logits.astype(np.float64)
    order = np.argsort(-x, kind="stable")
    keep = np.ones(len(x), bool)
    if sampling.top_k is not None:
        keep &= x >= x[order[min(sampling.top_k, len(x)) - 1]]
    p = np.where(keep, np.exp(x - x.max()), 0)
    p /= p.sum()
    if sampling.top_p < 1:
        before = np.concatenate([[0], np.cumsum(p[order])[:-1]])
        nucleus = np.zeros(len(x), bool)
        nucleus[order[before < sampling.top_p]] = True
        keep &= nucleus
    return keep & (p >= sampling.min_p * p.max())


@pytest.mark.parametrize(
    "fields",
    [
        dict(top_k=1),
        dict(top_k=7),
        dict(top_k=10**12),
        dict(top_p=0.3),
        dict(top_p=0.95),
        dict(top_p=1e-9),
        dict(min_p=0.1),
        dict(min_p=1.0),
        dict(top_k=20, top_p=0.7, min_p=0.02),
    ],
    ids=str,
)
def test_the_filters_keep_what_sorting_keeps(fields):
    sampling = Sampling(temperature=1.0, **fields)
    logits = 3 * np.random.default_rng(0).standard_normal((5, 97)).astype(np.float32)
    found = jax.jit(filtered, static_argnums=1)(logits, sampling.form, sampling.values)
    expected = np.array([kept(row, sampling) for row in logits])
    np.testing.assert_array_equal(np.isfinite(found), expected)
    np.testing.assert_array_equal(np.asarray(found)[expected], logits[expected])


def test_ties_at_the_border_are_kept_and_a_large_k_keeps_all():
    logits = np.array([[2.0, 1.0, 1.0, -0.5, 1.0]], np.float32)
    sampling = Sampling(temperature=1.0, top_k=2)
    assert list(np.isfinite(filtered(logits, sampling.form, sampling.values))[0]) == [True, True, True, False, True]


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones():
    logits = np.array([[2.0, -2.0, 2.0, -2.0]], np.float32)
    seen = np.array([[True, True, False, False]])
    np.testing.assert_allclose(penalised(logits, seen, 1.25), [[1.6, -2.5, 2.0, -2.0]])
    # It acts on a greedy choice too.
    sampling = Sampling(repetition_penalty=1.25)
    args = (sampling.keys(jnp.zeros(1, jnp.uint32)), jnp.int32(0), seen, sampling.form, sampling.values)
    assert int(choose(logits, *args)[0]) == 2


def test_samples_have_the_distribution_of_the_filtered_logits():
    sampling = Sampling(temperature=2.0, top_k=3, seed=7)
    logits = np.log(np.array([0.4, 0.1, 0.3, 0.2], np.float32))
    keys = sampling.keys(jnp.arange(4000, dtype=jnp.uint32))
    found = choose(jnp.tile(logits, (4000, 1)), keys, jnp.int32(0), None, sampling.form, sampling.values)
    expected = np.sqrt([0.4, 0, 0.3, 0.2])
    np.testing.assert_allclose(np.bincount(found, minlength=4) / 4000, expected / expected.sum(), atol=0.025)


def test_random_numbers_belong_to_seed_row_and_position():
    logits = jnp.zeros((3, 1000))

    def tokens(rows, position=0, seed=2**40):
        sampling = Sampling(temperature=1.0, seed=seed)
        keys = sampling.keys(jnp.asarray(rows, jnp.uint32))
        return list(
            map(int, choose(logits[: len(rows)], keys, jnp.int32(position), None, sampling.form, sampling.values))
        )

    first = tokens([0, 5, 9])
    assert len(set(first)) == 3
    assert tokens([9, 0]) == [first[2], first[0]]
    assert tokens([5], position=1) != [first[1]] and tokens([5], seed=1) != [first[1]]


@pytest.mark.parametrize(
    "wrong", [dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(min_p=1.5), dict(repetition_penalty=0.0)]
)
def test_values_that_make_no_sense_are_refused(wrong):
    with pytest.raises(FieldError, match=f"Sampling.{next(iter(wrong))}"):
        Sampling(**wrong)


def test_a_changed_number_is_no_other_program():
    one = Sampling(temperature=0.7, top_p=0.9)
    assert one.form == dataclasses.replace(one, temperature=0.2, top_p=0.5, seed=3).form
    assert one.form != dataclasses.replace(one, top_p=1.0).form
