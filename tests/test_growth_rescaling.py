"""The optimizer after a growth: exact continuation, copies that part or stay equal, and the rate of new entries."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flm_jax import model
from flm_jax.growth import Growth, Lineage, axis_maps, grow, grow_optimizer, grown_config
from flm_jax.growth.lineage import lineage_of
from flm_jax.growth.rescaling import (
    check_continues,
    new_entries,
    paced,
    rate_of_new,
    rescaled_optimizer,
    rescaling,
    scale_new,
)
from flm_jax.loss import loss_sum
from flm_jax.optimizer import OptimizerConfig
from tests import small

# Decay, clipping and an eps that is felt: everything that a growth has to carry over.
ADAMW = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip=0.5, eps=1e-3)
MUON = dataclasses.replace(ADAMW, name="muon")
WIDE = dict(compute_dtype="float64", param_dtype="float64")
KEY = jax.random.key(3)
OLD = small.config(heads=4, head_dim=4, **WIDE)
TWICE = small.config(embed=48, heads=8, head_dim=4, mlp=80, **WIDE)
QUARTER = small.config(embed=30, heads=5, head_dim=4, mlp=50, **WIDE)


def exact(methods):
    return Growth("copy", methods=methods, optimizer="exact")


def loss(cfg, params, tokens):
    x, y = tokens[:, :-1], tokens[:, 1:]
    return loss_sum(cfg, params, x, y, jnp.ones(x.shape), jnp.zeros_like(x)) / x.size


def trainer(cfg, view=None, optimizer=ADAMW):
    """A jitted step: params, optimizer state, tokens -> the next, and the gradient's loss."""
    tx = rescaled_optimizer(optimizer, cfg, model.declared(cfg)[1], view)

    @jax.jit
    def step(params, state, tokens):
        value, grads = jax.value_and_grad(lambda p: loss(cfg, p, tokens))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: -optimizer.learning_rate * u, updates)), state, value

    return tx, step


def batches(count):
    return [small.tokens((4, 13), seed) for seed in range(count)]


def after_warm_up(cfg, optimizer=ADAMW):
    tx, step = trainer(cfg, optimizer=optimizer)
    params = small.params(cfg)
    state = tx.init(params)
    for tokens in batches(5):
        params, state, _ = step(params, state, tokens)
    return params, state, step


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.abs(x).max()) for x, y in pairs)


def run_on(old, target, plan, steps=25, optimizer=ADAMW):
    """How far the grown model is from what the small one would grow into, after each has trained on its own."""
    params, state, step = after_warm_up(old, optimizer)
    new = grown_config(old, target, plan)
    view = rescaling(lineage_of(old, new, plan))
    _, big_step = trainer(new, view, optimizer)
    big = jax.jit(lambda p: grow(p, old, new, plan, KEY))(params)
    big_state = jax.jit(lambda s: grow_optimizer(s, old, new, plan, None, view))(state)
    for tokens in batches(steps):
        params, state, small_loss = step(params, state, tokens)
        big, big_state, big_loss = big_step(big, big_state, tokens)
    expected = jax.jit(lambda p: grow(p, old, new, plan, KEY))(params)
    return distance(expected, big), abs(float(small_loss - big_loss))


@pytest.mark.battery
@pytest.mark.parametrize("target", [TWICE, QUARTER], ids=["twice", "1.25 times"])
@pytest.mark.parametrize("method", ["copy", "uneven", "net2net"])
def test_adamw_continues_exactly_for_25_steps(target, method, x64):
    far, worse = run_on(OLD, target, Growth(method, optimizer="exact"))
    assert far < 1e-12
    assert worse < 1e-12


@pytest.mark.integration
def test_muon_continues_exactly_for_20_steps(x64):
    """Its matrices then hold copies in uneven numbers, whose singular values are not those of the small ones."""
    far, worse = run_on(OLD, QUARTER, Growth("uneven", optimizer="exact"), 20, MUON)
    assert far < 1e-10
    assert worse < 1e-10


@pytest.mark.integration
def test_adamw_continues_exactly_with_biases_and_query_and_key_norms(x64):
    fields = dict(qkv_bias=True, qk_norm=True, kv_heads=2)
    target = QUARTER.replace(**{**fields, "heads": 6, "kv_heads": 3})
    far, worse = run_on(OLD.replace(**fields), target, Growth("uneven", optimizer="exact"))
    assert far < 1e-12
    assert worse < 1e-12


def test_adamw_continues_exactly_when_the_residual_multiplier_and_its_base_change(x64):
    """Weights of writers are divided by the change, gradients multiplied; Adam's eps stays what it was."""
    target = TWICE.replace(residual_mult=0.4, base_layers=None)
    far, worse = run_on(OLD.replace(base_layers=5), target, Growth("copy", optimizer="exact"))
    assert far < 1e-12
    assert worse < 1e-12


@pytest.mark.parametrize(
    ("new", "growth", "message"),
    [
        (dict(mlp=50), Growth("noise", optimizer="exact"), "where mlp grows by 'noise'; copy, .*uneven allow it"),
        (dict(kv_heads=2), Growth("copy", optimizer="exact"), "kv_heads are divided .* 1 to 2.*optimizer='carry'"),
    ],
)
def test_a_growth_that_adamw_cannot_continue_exactly_is_refused(new, growth, message):
    old = small.config(kv_heads=1)
    with pytest.raises(ValueError, match=message):
        rescaling(lineage_of(old, old.replace(**new), growth))


def test_muon_continues_exactly_only_where_all_that_is_new_in_a_matrix_is_a_copy():
    """Layers and tokens are no axes of its matrices: they may grow in any way."""
    old, silent = small.config(), {"layers": "zero", "vocab": "zero"}
    check_continues(lineage_of(old, old.replace(mlp=50, layers=3, vocab=70), exact(silent)), "muon")
    for axis, method, rest in (("mlp", "zero", "copy, .*uneven allow it"), ("head_dim", "zero", "no method allows it")):
        lineage = lineage_of(old, old.replace(**{axis: 48}), exact({axis: method}))
        check_continues(lineage)
        with pytest.raises(
            ValueError, match=f"Muon cannot go on exactly where {axis} grows by 'zero'.*{rest}.*'carry'"
        ):
            check_continues(lineage, "muon")


@pytest.mark.integration
def test_carried_moments_alone_do_not_continue_exactly(x64):
    """The same growth, rates and eps left as they are: the test above would see it."""
    far, _ = run_on(OLD, TWICE, Growth("copy", optimizer="carry"))
    assert far > 1e-3


@pytest.mark.integration
@pytest.mark.parametrize(("optimizer", "first"), [(ADAMW, "copy"), (MUON, "net2net")], ids=["adamw", "muon"])
def test_a_second_exact_growth_continues_in_the_rescaling_of_the_first(optimizer, first, x64):
    plans = Growth(first, optimizer="exact"), Growth("copy", optimizer="exact")
    params, state, step = after_warm_up(OLD, optimizer)
    cfgs = [OLD, grown_config(OLD, QUARTER, plans[0])]
    target = QUARTER.replace(embed=54, mlp=90, heads=10)
    cfgs.append(grown_config(cfgs[1], target, plans[1]))
    views, lineage = [None], Lineage(OLD)
    big, big_state = params, state
    for plan, (old, new) in zip(plans, itertools.pairwise(cfgs), strict=True):
        lineage = lineage.grown(new, plan)
        views.append(rescaling(lineage))
        big = grow(big, old, new, plan, KEY)
        big_state = grow_optimizer(big_state, old, new, plan, views[-2], views[-1])
    _, big_step = trainer(cfgs[-1], views[-1], optimizer)
    for tokens in batches(6):
        params, state, small_loss = step(params, state, tokens)
        big, big_state, big_loss = big_step(big, big_state, tokens)
    assert abs(float(small_loss - big_loss)) < 1e-12


def test_carry_after_exact_gives_the_moments_of_the_gradients_themselves(x64):
    """Exact, then carry: the averages are those of the grown model's own gradients again."""
    exact, carry = Growth("copy", optimizer="exact"), Growth("copy", methods={"layers": "zero"})
    params, state, _ = after_warm_up(OLD)
    new = grown_config(OLD, QUARTER, exact)
    view = rescaling(lineage_of(OLD, new, exact))
    framed = grow_optimizer(state, OLD, new, exact, None, view)
    deeper = grown_config(new, new.replace(layers=3), carry)
    left = grow_optimizer(framed, new, deeper, carry, view, None)
    direct = grow_optimizer(grow_optimizer(state, OLD, new, carry), new, deeper, carry)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def asymmetry(cfg, params, old, plan):
    """The largest difference between copies, each seen at its source's size, over the largest entry."""
    maps, (_, signatures) = axis_maps(old, cfg, plan), model.declared(cfg)

    def one(sig, value):
        found = 0.0
        for dim, axis in enumerate(sig.axes):
            if axis in maps:
                span, rule = maps[axis].span, maps[axis].rules[sig.role(axis)]
                scale = np.broadcast_to(rule.scale, span.new).reshape(
                    (1,) * dim + (-1,) + (1,) * (value.ndim - dim - 1)
                )
                seen = np.asarray(value) / scale
                first = np.array([np.flatnonzero(span.source == s)[0] for s in span.source])
                found = max(found, np.abs(seen - seen.take(first, axis=dim)).max() / np.abs(seen).max())
        return found

    return max(jax.tree.leaves(jax.tree.map(one, signatures, params)))


@pytest.mark.battery
@pytest.mark.parametrize(
    ("optimizer", "plan", "parts"),
    [
        (ADAMW, Growth("copy"), False),
        (ADAMW, Growth("copy", optimizer="exact"), False),
        (ADAMW, Growth("copy", optimizer="fresh"), False),
        (ADAMW, Growth("uneven"), True),
        (ADAMW, Growth("noise"), True),
        (ADAMW, Growth("copy", optimizer="asymmetric", rewarm_steps=4), True),
        (MUON, Growth("copy"), False),
        (MUON, Growth("uneven"), True),
        (MUON, Growth("noise"), True),
    ],
    ids=lambda value: f"{value.name} {value.optimizer}" if isinstance(value, Growth) else getattr(value, "name", ""),
)
def test_copies_diverge_when_a_method_breaks_symmetry_and_stay_identical_otherwise(optimizer, plan, parts, x64):
    params, state, _ = after_warm_up(OLD, optimizer)
    new = grown_config(OLD, TWICE, plan)
    lineage = lineage_of(OLD, new, plan)
    view = rescaling(lineage)
    tx = rescaled_optimizer(optimizer, new, model.declared(new)[1], view)
    big, big_state = grow(params, OLD, new, plan, KEY), grow_optimizer(state, OLD, new, plan, None, view)

    @jax.jit
    def step(params, state, tokens, number):
        updates, state = tx.update(jax.grad(lambda p: loss(new, p, tokens))(params), state, params)
        if plan.optimizer == "asymmetric":
            updates = paced(optimizer, lineage, updates, number, jnp.int32(5) + number)
        return optax.apply_updates(params, jax.tree.map(lambda u: -1e-2 * u, updates)), state

    for number, tokens in enumerate(batches(10)):
        big, big_state = step(big, big_state, tokens, number)
    apart = asymmetry(new, big, OLD, plan)
    assert apart > 1e-3 if parts else apart < 1e-12


def test_the_rate_of_new_entries_corrects_for_their_age_and_warms_up():
    plan = Growth("copy", optimizer="asymmetric", rewarm_steps=4, rewarm_to=1.3)
    b1, b2, late = 0.9, 0.999, 10_000
    m = v = 0.0
    for step in range(8):
        gradient = 0.7
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        total = late + step + 1
        adam = (m / (1 - b1**total)) / (v / (1 - b2**total)) ** 0.5
        factor = float(rate_of_new(plan, jnp.int32(step), jnp.int32(late + step), b1, b2))
        # A constant gradient makes an Adam of the right age step by exactly one rate.
        assert adam * factor == pytest.approx(1.3 * min((step + 1) / 4, 1), rel=1e-4)


def test_muons_new_entries_are_only_rewarmed():
    """Its momentum has no bias correction to make up for; what AdamW trains has."""
    old, plan = small.config(), Growth("copy", optimizer="asymmetric", rewarm_steps=4, rewarm_to=1.3)
    lineage = lineage_of(old, old.replace(mlp=50, vocab=70), dataclasses.replace(plan, methods={"vocab": "zero"}))
    ones = jax.tree.map(jnp.ones_like, small.params(lineage.cfg))
    step, count = jnp.int32(1), jnp.int32(1000)
    found = paced(MUON, lineage, ones, step, count)
    age = float(rate_of_new(plan, step, count, MUON.b1, MUON.b2))
    assert age != pytest.approx(0.65, rel=0.01)
    np.testing.assert_allclose(found["blocks"]["mlp"]["down"][:, 40:], 0.65, rtol=1e-6)
    np.testing.assert_allclose(found["blocks"]["mlp"]["down"][:, :40], 1.0)
    np.testing.assert_allclose(found["head"][:, 61:], age, rtol=1e-6)


def test_only_new_entries_are_scaled():
    old, new = small.config(), small.config(embed=30, layers=3)
    plan = Growth("zero", optimizer="asymmetric")
    _, signatures = model.declared(new)
    ones = jax.tree.map(jnp.ones_like, small.params(new))
    paced = scale_new(ones, new_entries(lineage_of(old, new, plan)), jnp.float32(0.5))
    maps = axis_maps(old, new, plan)

    def check(sig, value):
        fresh = np.zeros(value.shape, bool)
        for dim, axis in enumerate(sig.axes):
            if axis in maps:
                fresh |= maps[axis].span.fresh.reshape((1,) * dim + (-1,) + (1,) * (value.ndim - dim - 1))
        np.testing.assert_array_equal(value, np.where(fresh, 0.5, 1.0))

    jax.tree.map(check, signatures, paced)


@pytest.mark.integration
def test_an_average_of_parameters_grows_as_parameters_do():
    """Growth is linear where nothing is drawn: the average of two models grows into the average of their growths."""
    old, new = small.config(), small.config(embed=30, mlp=50, heads=3)
    plan = Growth("copy")
    new = grown_config(old, new, plan)
    a, b = small.params(old, 0), small.params(old, 1)
    middle = jax.tree.map(lambda x, y: 0.5 * (x + y), a, b)
    grown = [grow(p, old, new, plan, KEY) for p in (a, b, middle)]
    jax.tree.map(lambda x, y, z: np.testing.assert_allclose(0.5 * (x + y), z, atol=1e-6), *grown)
