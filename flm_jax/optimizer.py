"""AdamW and Muon with muP's multipliers, learning-rate schedules, and what their states hold.

The learning rate is applied in the train step and follows the step within the stage. The optimizer's own state is
therefore only moments and one count, and no schedule in it has to be reset when the model grows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flm_jax.config import ModelConfig
from flm_jax.kernels.orthogonal import orthogonalized
from flm_jax.records import counted, recorded
from flm_jax.records.fields import Count, Fraction, Limit, NonNegative, Positive, Size, one_of
from flm_jax.sharding import param_shardings, replicated
from flm_jax.signature import Signature, Sizes

OPTIMIZERS = ("adamw", "muon")
# Fields of `OptimizerConfig` that only Muon has. AdamW's apply to both: Muon leaves vector-like parameters to AdamW.
OF_MUON = ("momentum", "nesterov", "newton_schulz_steps")
SCHEDULES = ("wsd", "cosine", "linear", "constant")
# The root mean square of Muon's updates at the base width, about that of AdamW's (2502.16982, section 2.2).
MUON_RMS = 0.2
Decay = Annotated[float, Limit("at least 0 and less than 1", lambda rate: 0 <= rate < 1)]


@dataclass(frozen=True)
@recorded
class OptimizerConfig:
    """The optimizer's settings and the learning-rate schedule of one stage.

    Attributes:
      learning_rate: peak rate at the base width; for matrix-like parameters it is divided by their width multiplier.
      matrix_rate: the rate of matrix-like parameters at the base width, as a multiple of `learning_rate`.
      schedule: wsd (warm-up, stable, linear decay), cosine, linear, constant.
      warmup_steps: steps of linear warm-up at the start of the stage, from `warmup_from`.
      warmup_from: fraction of the peak at which the warm-up starts: 0 for a first stage, more after a growth.
      decay_steps: steps of decay at the end of the stage (wsd).
      final_rate: fraction of the peak at which a decay ends; the last step of the stage is one step before that end.
      decay_span: total length in steps of a cosine or linear decay that extends beyond this stage, before it, after it
        or both. 0: the decay runs from the end of the warm-up to the end of the stage.
      decay_passed: steps of `decay_span` that are before this stage.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: added to the root of the second moment; for parameters of blocks times `base_layers / layers`, if a model has
        `base_layers`.
      weight_decay: decoupled, multiplied by the rate at the base width; gains and biases are exempt.
      clip: largest global norm of the gradient; 0: no clipping.
      name: adamw, or muon: for matrix-like parameters the momentum of the gradient with its singular values made equal
        (Newton-Schulz steps in the model's compute_dtype), for the others AdamW with the settings above.
      momentum: decay of the moving average of gradients (muon).
      nesterov: whether the gradient is averaged in once more before the step (muon).
      newton_schulz_steps: steps of the orthogonalisation (muon).
    """

    learning_rate: Positive = 1e-3
    matrix_rate: Positive = 1.0
    schedule: Annotated[str, one_of(SCHEDULES)] = "wsd"
    warmup_steps: Count = 0
    warmup_from: Fraction = 0.0
    decay_steps: Count = 0
    final_rate: Fraction = 0.0
    decay_span: Count = 0
    decay_passed: Count = 0
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    clip: NonNegative = 1.0
    name: Annotated[str, one_of(OPTIMIZERS)] = "adamw"
    momentum: Decay = 0.95
    nesterov: bool = True
    newton_schulz_steps: Size = 5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if self.name != "muon" and field.name in OF_MUON and (given := getattr(self, field.name)) != field.default:
                raise ValueError(f"OptimizerConfig.{field.name}={given} belongs to muon, not {self.name}.")
        if self.decay_steps and self.schedule != "wsd":
            raise ValueError(f"OptimizerConfig.decay_steps={self.decay_steps} belongs to wsd, not {self.schedule}.")
        if (self.decay_span or self.decay_passed) and self.schedule not in ("cosine", "linear"):
            raise ValueError(
                f"OptimizerConfig.decay_span and decay_passed belong to cosine and linear, not {self.schedule}."
            )
        if self.decay_passed and self.decay_passed >= self.decay_span:
            raise ValueError(
                f"OptimizerConfig.decay_passed={self.decay_passed} is not within decay_span={self.decay_span}: no step "
                "of the decay would be left."
            )
        if self.final_rate and (self.schedule == "constant" or (self.schedule == "wsd" and not self.decay_steps)):
            raise ValueError(f"OptimizerConfig.final_rate={self.final_rate} has no effect: nothing decays.")


def schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at the base width, as a function of the step within a stage of `steps` steps.

    Raises:
      ValueError: warm-up and decay together are longer than the stage, or the decay ends before the stage does.
    """
    if cfg.warmup_steps + cfg.decay_steps > steps:
        raise ValueError(
            f"Warm-up ({counted(cfg.warmup_steps, 'step')}) and decay ({cfg.decay_steps}) are longer than "
            f"the stage ({steps})."
        )
    peak, final = cfg.learning_rate, cfg.learning_rate * cfg.final_rate
    rest = steps - cfg.warmup_steps
    if cfg.decay_span and cfg.decay_span - cfg.decay_passed < steps:
        raise ValueError(
            f"decay_span={cfg.decay_span} minus decay_passed={cfg.decay_passed} is less than the stage's "
            f"{counted(steps, 'step')}: the decay would end within the stage."
        )
    if cfg.decay_span:
        decayed = _decaying(cfg, peak, final, cfg.decay_span)

        def within(step: Any) -> Any:
            """The rate of the decay, times the warm-up."""
            rate = decayed(step + cfg.decay_passed)
            if not cfg.warmup_steps:
                return rate
            return rate * optax.linear_schedule(cfg.warmup_from, 1.0, cfg.warmup_steps)(step)

        return within
    flat = optax.constant_schedule(peak)
    parts: list[tuple[int, optax.Schedule]] = []
    if cfg.warmup_steps:
        parts.append((cfg.warmup_steps, optax.linear_schedule(peak * cfg.warmup_from, peak, cfg.warmup_steps)))
    if cfg.schedule == "wsd":
        parts.append((rest - cfg.decay_steps, flat))
        if cfg.decay_steps:
            parts.append((cfg.decay_steps, optax.linear_schedule(peak, final, cfg.decay_steps)))
    elif cfg.schedule == "constant":
        parts.append((rest, flat))
    else:
        parts.append((rest, _decaying(cfg, peak, final, max(rest, 1))))
    ends = [sum(length for length, _ in parts[: i + 1]) for i in range(len(parts) - 1)]
    return optax.join_schedules([part for _, part in parts], ends)


def _decaying(cfg: OptimizerConfig, peak: float, final: float, steps: int) -> optax.Schedule:
    if cfg.schedule == "cosine":
        return optax.cosine_decay_schedule(peak, steps, alpha=cfg.final_rate)
    return optax.linear_schedule(peak, final, steps)


def scale_by_width(mults: Any) -> optax.GradientTransformation:
    """The transformation that divides each parameter's update by a number, such as its width multiplier."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        return jax.tree.map(lambda mult, u: u if mult == 1 else u / mult, mults, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def decay(rate: float, decays: Any) -> optax.GradientTransformation:
    """The transformation that adds `rate` times the parameters that decay.

    It has no state, so that the optimizer's state has the same form in every stage.
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if rate:
            updates = jax.tree.map(lambda on, u, p: u + rate * p if on else u, decays, updates, params)
        return updates, state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def width_mult(cfg: OptimizerConfig, sig: Signature, sizes: Sizes, base: Sizes) -> float:
    """The number that a parameter's update is divided by, so that one rate serves every width.

    For AdamW this is muP's width multiplier (2203.03466, Table 8). The singular values of Muon's updates are about 1,
    whatever the width. They become 0.2 sqrt(max(fan-in, fan-out)) at the base width, where the root mean square of the
    update is then 0.2, and grow as sqrt(fan-out / fan-in) from there: so do the largest ones of AdamW's under muP.

    Args:
      cfg: the optimizer's name, and its `matrix_rate`.
      sig: the parameter's signature.
      sizes: of the model's axes.
      base: of the axes of muP's base model.
    """
    if not sig.is_matrix_like:
        return 1.0
    mult = sig.width_mult(sizes, base)
    if cfg.name == "muon":
        (fan_in, fan_out), (base_in, base_out) = sig.fans(sizes), sig.fans(base)
        mult = 1 / (MUON_RMS * math.sqrt(max(base_in, base_out) * (fan_out / base_out) / (fan_in / base_in)))
    return mult / cfg.matrix_rate


def depth_mult(sig: Signature, model: ModelConfig) -> float:
    """The factor on Adam's eps, which follows the depth for the blocks' parameters (`ModelConfig.base_layers`).

    The gradients of a block are as small as the multiplier of what it adds to the residual stream (CompleteP,
    2505.01618, Table 1).
    """
    return model.depth_mult if sig.stacked else 1.0


def scale_by_adam(cfg: OptimizerConfig, eps_mults: Any) -> optax.GradientTransformation:
    """Adam's direction, m / (sqrt(v) + eps), with an eps for each parameter, and the state of `optax.scale_by_adam`."""
    adam = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)
    if all(mult == 1 for mult in jax.tree.leaves(eps_mults)):
        return adam

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = adam.update(grads, state, params)
        m, v = (
            optax.tree_utils.tree_bias_correction(moment, b, state.count)
            for moment, b in ((state.mu, cfg.b1), (state.nu, cfg.b2))
        )
        return jax.tree.map(lambda mult, m, v: m / (jnp.sqrt(v) + cfg.eps * mult), eps_mults, m, v), state

    return optax.GradientTransformation(adam.init, update)


def direction(
    cfg: OptimizerConfig, signatures: Any, mults: Any, eps_mults: Any, dtype: Any, shares: Any = None
) -> optax.GradientTransformation:
    """The optimizer without clipping, sign and learning rate: the train step adds minus the rate times these updates.

    Weight decay is added after muP's division. This is the published rule, where the decay is multiplied by the width
    multiplier and the rate divided by it: every parameter that decays shrinks by the same fraction per step, at any
    width.

    Args:
      cfg: the optimizer's settings and weight decay.
      signatures: tree of the parameters' signatures.
      mults: tree of what their updates are divided by, see `width_mult`.
      eps_mults: tree of factors on Adam's eps, see `depth_mult`.
      dtype: of Muon's orthogonalisation.
      shares: see `scale_by_muon`.
    """
    decays = jax.tree.map(lambda sig: sig.decays, signatures)
    muon = cfg.name == "muon"
    first = scale_by_muon(cfg, signatures, eps_mults, dtype, shares) if muon else scale_by_adam(cfg, eps_mults)
    return optax.chain(first, scale_by_width(mults), decay(cfg.weight_decay, decays))


# One vector per dimension, shaped to broadcast; the factor of an entry is the product of its vectors' values.
Factors = tuple[np.ndarray, ...]


def times(x: jax.Array, factors: Factors, power: float = 1) -> jax.Array:
    """`x` times the product of `factors`, each to the given power, in the dtype of `x`."""
    for factor in factors:
        if not np.all(factor == 1):
            x = x * np.power(factor, float(power)).astype(x.dtype)
    return x


def scale_by_muon(
    cfg: OptimizerConfig, signatures: Any, eps_mults: Any, dtype: Any, shares: Any = None
) -> optax.GradientTransformation:
    """The transformation of Muon for matrix-like parameters, and of Adam for the others.

    Its state is that of Adam, without the second moments of matrices. The momentum m is a moving average of gradients
    without bias correction, since the size of m has no effect. With a gradient g the direction is
    b m + (1 - b) g, orthogonalised; m itself without Nesterov's look ahead.

    Args:
      cfg: its settings.
      signatures: tree of the parameters' signatures.
      eps_mults: tree of factors on Adam's eps.
      dtype: of the orthogonalisation.
      shares: tree of `Factors`; the entries of a matrix that are copies of one entry have shares that add up to 1. The
        matrix is orthogonalised without the copies, and copies get the update of what they are copies of. None: no
        entries are copies.
    """
    matrices = jax.tree.map(lambda sig: sig.is_matrix_like, signatures)
    others = jax.tree.map(lambda sig: not sig.is_matrix_like, signatures)
    adam, b = scale_by_adam(cfg, only(others, eps_mults)), cfg.momentum

    def init(params: Any) -> optax.ScaleByAdamState:
        state = adam.init(only(others, params))
        return state._replace(mu=joined(matrices, optax.tree.zeros_like(params), state.mu))

    def step(sig: Signature, ahead: jax.Array, share: Factors = ()) -> jax.Array:
        # With counts n of copies, the rows and columns of P G Q' / sqrt(n_r n_c) have the singular values of G.
        return times(orthogonalized(times(ahead, share, 0.5), sig, cfg.newton_schulz_steps, dtype), share, -0.5)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        of_others, rest = adam.update(only(others, grads), state._replace(mu=only(others, state.mu)))
        seen = only(matrices, grads)
        m = jax.tree.map(lambda m, g: b * m + (1 - b) * g, only(matrices, state.mu), seen)
        ahead = jax.tree.map(lambda m, g: b * m + (1 - b) * g, m, seen) if cfg.nesterov else m
        given = [only(matrices, shares)] if shares is not None else []
        of_matrices = jax.tree.map(step, only(matrices, signatures), ahead, *given)
        return joined(matrices, of_matrices, of_others), rest._replace(mu=joined(matrices, m, rest.mu))

    return optax.GradientTransformation(init, update)


# The optimizer's state
#
# For each class of state: its fields that are moving averages, and of which power of the gradient. They grow by the
# duals of the parameters' maps. Its other fields are counts. A new optimizer adds the class of its state here.
#
# An average is a tree like the parameters. Where a parameter has no such average, the tree has `optax.MaskedNode()`
# in place of an array: it costs no memory, and no checkpoint has a leaf for it. `only` makes such trees, `map_average`
# maps over them, and all that handles averages goes through it.
AVERAGES: dict[type, dict[str, int]] = {optax.ScaleByAdamState: {"mu": 1, "nu": 2}}


def only(flags: Any, tree: Any) -> Any:
    """A tree like the parameters, with `optax.MaskedNode()` where `flags`, a tree of bools, is False."""
    return jax.tree.map(lambda on, leaf: leaf if on else optax.MaskedNode(), flags, tree)


def joined(flags: Any, a: Any, b: Any) -> Any:
    """A tree like the parameters: that of `a` where `flags` is True, that of `b` where it is False."""
    return jax.tree.map(lambda on, x, y: x if on else y, flags, a, b)


def is_masked(node: Any) -> bool:
    """Whether a node of a tree like the parameters says that there is nothing for one of them, such as a moment."""
    return isinstance(node, optax.MaskedNode)


def in_form(state: Any, like: Any) -> Any:
    """An optimizer's state with the moments that `like` has: those that `state` lacks are 0, others are left out.

    Args:
      state: an optimizer's state, in which moments may be missing (`is_masked`).
      like: arrays or `jax.ShapeDtypeStruct`s; where one has a sharding, new moments get it.
    """

    def one(wanted: Any, found: Any) -> Any:
        if is_masked(wanted):
            return wanted
        if is_masked(found):
            return jnp.zeros(wanted.shape, wanted.dtype, device=wanted.sharding)
        return found

    return jax.tree.map(one, like, state, is_leaf=is_masked)


def map_average(one: Callable[..., Any], average: Any, *rest: Any) -> Any:
    """`jax.tree.map` over an average and trees like the parameters; it leaves out parameters that have no average."""
    return jax.tree.map(
        lambda leaf, *others: leaf if is_masked(leaf) else one(leaf, *others), average, *rest, is_leaf=is_masked
    )


def map_parts(one: Callable[..., Any], state: Any, *others: Any) -> Any:
    """An optimizer's state with every moving average and every count replaced by the result of `one`.

    Args:
      one: called with the power of the gradient and the average (a tree like the parameters, in which moments may be
        missing, see `is_masked`), or with None and a count; and with the same part of each of `others`.
      state: the optimizer's state; its leaves may be anything in the place of arrays.
      others: states of the same optimizer.

    Raises:
      ValueError: the state has an array with dimensions that `AVERAGES` does not declare; the message names its path.
    """

    def part(path: Any, node: Any, *nodes: Any) -> Any:
        powers = AVERAGES.get(type(node))
        if powers is not None:
            return node._replace(
                **{
                    name: one(powers.get(name), value, *(getattr(other, name) for other in nodes))
                    for name, value in node._asdict().items()
                }
            )
        if getattr(node, "ndim", 0):
            raise ValueError(
                f"The optimizer's state holds {jax.tree_util.keystr(path)}, {node.dtype}{list(node.shape)}, and it is "
                "not declared how it grows: add the class of its state to flm_jax.optimizer.AVERAGES, with the power "
                "of the gradient that each of its fields averages."
            )
        return node

    return jax.tree_util.tree_map_with_path(part, state, *others, is_leaf=lambda node: type(node) in AVERAGES)


def state_shardings(tx: optax.GradientTransformation, signatures: Any, shapes: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The optimizer state's shapes and shardings: moments are sharded like their parameters, counts replicated.

    Where `signatures` and `shapes` leave a parameter out (`is_masked`), it has no moments.
    """
    state, where = jax.eval_shape(tx.init, shapes), param_shardings(signatures, shapes, mesh)

    def place(power: int | None, part: Any) -> Any:
        return replicated(mesh) if power is None else map_average(lambda _, place: place, part, where)

    return state, map_parts(place, state)
