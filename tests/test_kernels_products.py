"""Products with weights have JAX's own values and gradients; what is recomputed is not kept."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_jax import model
from flm_jax.kernels import products
from flm_jax.kernels.products import contracted, product, recomputed
from tests import small

SHAPES = {"B": 2, "T": 3, "D": 4, "F": 9, "N": 2, "H": 6, "V": 40}
EQUATIONS = ["BTD,DF->BTF", "BTF,FD->BTD", "BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DV->BTV", "BTD,VD->BTV"]


def drawn(equation):
    rng = np.random.default_rng(0)
    x, w, y = equation.replace("->", ",").split(",")
    return tuple(jnp.asarray(rng.normal(size=[SHAPES[axis] for axis in axes]), jnp.float32) for axes in (x, w, y))


@pytest.mark.parametrize("equation", EQUATIONS)
def test_values_and_gradients_are_those_of_einsum(equation):
    x, w, dy = drawn(equation)
    y, back = jax.vjp(lambda x, w: product(equation, x, w), x, w)
    expected, of_einsum = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    for mine, its in zip(back(dy), of_einsum(dy), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-5)


AXES = st.lists(st.sampled_from("BTDFNHV"), unique=True, max_size=3)


@given(order=st.permutations("BTDFNHV"), batch=AXES, summed=AXES, random=st.randoms(use_true_random=False))
def test_a_contraction_has_the_value_of_einsum_for_any_axes_in_any_order(order, batch, summed, random):
    common = set(batch) | set(summed)
    rest = [axis for axis in order if axis not in common]
    of_x, of_y = ([*sorted(common), *rest[side::2]] for side in (0, 1))
    of_result = [axis for axis in order if axis not in set(summed) - set(batch)]
    for axes in (of_x, of_y, of_result):
        random.shuffle(axes)
    equation = f"{''.join(of_x)},{''.join(of_y)}->{''.join(of_result)}"
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=[1 + "BTDFNHV".index(axis) % 3 for axis in axes]) for axes in (of_x, of_y))
    found = contracted(equation, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    np.testing.assert_allclose(found, np.einsum(equation, x, y), rtol=1e-5, atol=1e-5)


def dots(jaxpr):
    """The parameters of all products in a program."""
    own = [step.params["dimension_numbers"] for step in jaxpr.eqns if step.primitive.name == "dot_general"]
    inner = [x for step in jaxpr.eqns for x in jax.extend.core.jaxprs_in_params(step.params)]
    return own + [found for x in inner for found in dots(x)]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_axes_that_are_summed_over_keep_their_order(equation):
    """`jnp.einsum` pairs them backwards: heads and their width would change places in memory, also in a weight."""
    x, w, dy = drawn(equation)

    def ordered(function):
        program = jax.make_jaxpr(lambda x, w: jax.vjp(lambda x, w: function(equation, x, w), x, w)[1](dy))(x, w)
        return [list(side) == sorted(side) for summed, _ in dots(program.jaxpr) for side in summed]

    assert len(ordered(product)) == 6 and all(ordered(product))
    if equation == "BTNH,NHD->BTD":
        assert not all(ordered(jnp.einsum))


def test_a_tied_head_is_multiplied_as_it_lies():
    cfg = small.config(tied=True)
    logits = functools.partial(model.Transformer(cfg).apply, method="logits")
    program = str(jax.make_jaxpr(logits)({"params": small.params(cfg)}, jnp.ones((1, 1, cfg.embed))))
    assert "dot_general" in program and "transpose" not in program


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gradient_of_a_wider_result_is_as_narrow_as_the_operands_unless_float16(dtype):
    x, w, dy = drawn("BTD,DV->BTV")
    # Gradients that float16 rounds to zero, and activations that make visible ones of them.
    x, w, dy = (100 * x).astype(dtype), w.astype(dtype), dy * 1e-8
    y, back = jax.vjp(lambda x, w: product("BTD,DV->BTV", x, w, jnp.float32), x, w)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, jnp.einsum("BTD,DV->BTV", x, w, preferred_element_type=jnp.float32))
    dx, dw = back(dy)
    assert dx.dtype == dw.dtype == jnp.dtype(dtype)
    exact = np.einsum("BTD,BTV->DV", np.float64(x), np.float64(dy))
    np.testing.assert_allclose(np.float64(dw), exact, atol=0.05 * np.abs(exact).max())
    operands = str(jax.make_jaxpr(back)(dy)).split("dot_general")[0]
    assert (f"new_dtype={dtype}" in operands) == (dtype == "bfloat16")


@pytest.mark.parametrize("equation", EQUATIONS)
def test_on_a_cpu_the_smaller_is_the_left_operand_of_a_weights_gradient(equation, monkeypatch):
    """CPUs transpose the left operand; by itself JAX puts the gradient there, which is larger where a layer widens."""
    x, w, dy = drawn(equation)

    def left(function):
        program = jax.make_jaxpr(lambda x, w: jax.vjp(lambda w: function(equation, x, w), w)[1](dy))(x, w)
        found, barriers = [], []

        def find(jaxpr):
            for step in jaxpr.eqns:
                if step.primitive.name == "dot_general":
                    found.append(step.invars[0].aval.shape)
                if step.primitive.name == "optimization_barrier":
                    barriers.append(step.invars[0].aval.shape)
                for inner in jax.extend.core.jaxprs_in_params(step.params):
                    find(inner)

        find(program.jaxpr)
        return found[-1], barriers

    # The last product is the gradient of the weight. Without the barrier, XLA exchanges the operands again.
    smaller = x.shape if x.size <= dy.size else dy.shape
    found, barriers = left(product)
    assert found == smaller and len(barriers) == 1
    assert left(jnp.einsum)[0] == dy.shape
    monkeypatch.setattr(products, "platform", lambda: "tpu")
    assert left(product) == (x.shape, [])


def test_what_is_recomputed_keeps_its_arguments_alone():
    x = jnp.arange(6.0) / 7

    def wavy(x):
        return jnp.sin(jnp.exp(x)) * x

    def kept(function):
        return len([1 for leaf in jax.tree.leaves(jax.vjp(function, x)[1]) if getattr(leaf, "shape", ()) == x.shape])

    assert kept(recomputed(wavy)) == 1 < kept(wavy)
    np.testing.assert_allclose(jax.grad(lambda x: recomputed(wavy)(x).sum())(x), jax.grad(lambda x: wavy(x).sum())(x))
