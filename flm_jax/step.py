"""The train state and one optimizer step."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from flm_jax.config import ModelConfig
from flm_jax.growth.exact_adamw import new_entries, rate_of_new, scale_new
from flm_jax.growth.grow import grow, grow_optimizer
from flm_jax.growth.plan import Growth, masks_at
from flm_jax.loss import loss_sum
from flm_jax.model import Masks, Params, declared, init_params
from flm_jax.optimizer import optimizer, schedule, state_shardings
from flm_jax.recipe import ResolvedStage
from flm_jax.sharding import abstract, param_shardings, replicated


class TrainState(struct.PyTreeNode):
    """All that training changes.

    Attributes:
      step: () int32, steps done in this stage.
      params: parameters.
      opt_state: moments, and their count, which goes on from stage to stage.
    """

    step: Any
    params: Params
    opt_state: Any


class Metrics(struct.PyTreeNode):
    """What one step reports; () float32 each, `bad` is 1 for a step that was skipped because it was not finite."""

    loss: jax.Array
    grad_norm: jax.Array
    update_norm: jax.Array
    param_norm: jax.Array
    learning_rate: jax.Array
    mask: jax.Array
    bad: jax.Array


@contextlib.contextmanager
def quietly_donated() -> Iterator[None]:
    """Within it, buffers that are given up and fit no output cause no warning: of a growth, most do not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        yield


class StageProgram:
    """The functions of one stage: shapes first, then shardings, then values.

    Attributes:
      abstract_state: shapes and shardings of its `TrainState`.
      signatures: tree of the parameters' signatures.
    """

    def __init__(
        self, stage: ResolvedStage, mesh: Mesh, chunks: int, compiler_options: Mapping[str, str] | None = None
    ) -> None:
        self.stage, self.mesh, self.chunks = stage, mesh, chunks
        # Options are a compiler's own: others refuse them.
        on_tpu = mesh.devices.flat[0].platform == "tpu"
        self.options = dict(compiler_options) if compiler_options and on_tpu else None
        self.shapes, self.signatures = declared(stage.cfg)
        self.tx = optimizer(stage.stage.optimizer, stage.cfg, self.signatures, stage.frame)
        opt_shapes, opt_shardings = state_shardings(self.tx, self.signatures, self.shapes, mesh)
        shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), self.shapes, opt_shapes)
        params = param_shardings(self.signatures, self.shapes, mesh)
        self.shardings = TrainState(replicated(mesh), params, opt_shardings)
        self.abstract_state = abstract(shapes, self.shardings)
        self.rate = schedule(stage.stage.optimizer, stage.stage.steps)

    def check_trains(self, context: int) -> None:
        """Checks that the mesh can split this stage's batches: not every mesh that its state lives on trains it.

        Raises:
            ValueError: it cannot; the message names sizes that work.
        """
        stage, mesh = self.stage, self.mesh
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if context % mesh.shape["sequence"]:
            fits = [n for n in range(1, context + 1) if context % n == 0]
            sequence = mesh.shape["sequence"]
            near = [n for n in fits if n < sequence][-1:] + [n for n in fits if n > sequence][:1]
            raise ValueError(
                f"Stage {stage.stage.name!r}: MeshConfig.sequence={sequence} does not divide the context of {context} "
                f"tokens; the nearest sizes that do are {' and '.join(map(str, near))}."
            )
        if stage.stage.batch_size % (shards * stage.stage.accumulate):
            raise ValueError(
                f"Stage {stage.stage.name!r}: batch_size={stage.stage.batch_size} must be a multiple of data x fsdp x "
                f"accumulate = {shards * stage.stage.accumulate}, such as "
                f"{-(-stage.stage.batch_size // (shards * stage.stage.accumulate)) * shards * stage.stage.accumulate}."
            )

    def settle(self, growth: Growth) -> None:
        """Takes a plan in place of the recipe's: one that says where layers go, once that is measured."""
        self.stage = dataclasses.replace(self.stage, stage=dataclasses.replace(self.stage.stage, growth=growth))

    def follow(self, before: ResolvedStage) -> None:
        """Takes the stage before as it has really been, its growth settled."""
        self.stage = dataclasses.replace(self.stage, before=before)

    def initialiser(self) -> Any:
        """Jitted: key -> the state of a first stage."""

        def initialise(key: jax.Array) -> TrainState:
            params = init_params(self.stage.cfg, key)
            return TrainState(jnp.zeros((), jnp.int32), params, self.tx.init(params))

        return jax.jit(initialise, out_shardings=self.shardings)

    def grower(self, donate: bool = False, weights: bool = False) -> Any:
        """Jitted: the state at the end of the stage before, key -> the state at the start of this one.

        Args:
          donate: the given state is used up: what keeps its shape and place keeps its memory, such as the embedding
            where a model grows in depth alone. What grows cannot, and XLA warns of it (`quietly_donated`).
          weights: the state is of weights alone.
        """
        before, plan = self.stage.before, self.stage.stage.growth
        assert before is not None and plan is not None
        old, new = before.cfg, self.stage.cfg

        def grow_state(state: TrainState, key: jax.Array) -> TrainState:
            return TrainState(
                step=jnp.zeros((), jnp.int32),
                params=grow(state.params, old, new, plan, key),
                opt_state=grow_optimizer(state.opt_state, old, new, plan, before.frame, self.stage.frame),
            )

        shardings = self.shardings.replace(opt_state=()) if weights else self.shardings
        return jax.jit(grow_state, donate_argnums=(0,) if donate else (), out_shardings=shardings)

    def parameter_growers(self) -> Iterator[Any]:
        """Jitted, for one parameter after the other: those of the stage before, key -> this one, grown."""
        before, plan = self.stage.before, self.stage.stage.growth
        assert before is not None and plan is not None
        old, new = before.cfg, self.stage.cfg
        for number, where in enumerate(jax.tree.leaves(self.shardings.params)):

            def one(params: Params, key: jax.Array, number: int = number) -> jax.Array:
                grown: jax.Array = jax.tree.leaves(grow(params, old, new, plan, key))[number]
                return grown

            yield jax.jit(one, out_shardings=where)

    def masks(self, step: int | jax.Array) -> Masks | None:
        """The growth masks after `step` steps; None from the end of the ramp on, where they leave the program."""
        if isinstance(step, int) and step >= self.stage.ramp_steps:
            return None
        before, plan = self.stage.before, self.stage.stage.growth
        assert before is not None and plan is not None
        return masks_at(before.cfg, self.stage.cfg, plan, step)

    def _paced(self, updates: Params, state: TrainState) -> Params:
        """The optimizer's steps, those of new entries at their own rate if the growth gives them one."""
        before, plan, cfg = self.stage.before, self.stage.stage.growth, self.stage.stage.optimizer
        if before is None or plan is None or plan.optimizer != "asymmetric":
            return updates
        count = optax.tree_utils.tree_get(state.opt_state, "count")
        factor = rate_of_new(plan, state.step, count, cfg.b1, cfg.b2)
        return scale_new(updates, new_entries(before.cfg, self.stage.cfg, plan), factor)

    def stepper(self, masked: bool) -> Any:
        """Jitted: state, batch -> the next state (the given one is donated) and metrics.

        A step whose loss or gradient is not finite changes nothing but the count of steps.
        """
        cfg, parts = self.stage.cfg, self.stage.stage.accumulate

        def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            masks = self.masks(state.step) if masked else None
            loss, grads = _accumulated(cfg, state.params, batch, masks, self.chunks, parts)
            updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
            rate = jnp.asarray(self.rate(state.step), jnp.float32)
            updates = jax.tree.map(lambda u: -rate.astype(u.dtype) * u, self._paced(updates, state))
            grad_norm = optax.tree.norm(grads)
            good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(good, new, old),
                (optax.apply_updates(state.params, updates), opt_state),
                (state.params, state.opt_state),
            )
            metrics = Metrics(
                loss=loss,
                grad_norm=grad_norm,
                update_norm=optax.tree.norm(updates),
                param_norm=optax.tree.norm(state.params),
                learning_rate=rate,
                mask=_lowest(masks),
                bad=1.0 - good,
            )
            return TrainState(state.step + 1, params, opt_state), metrics

        out = (self.shardings, replicated(self.mesh))
        return jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=self.options)


def _lowest(masks: Masks | None) -> jax.Array:
    """Where the entries stand that have come least far."""
    flags = [] if masks is None else [m for m in masks._replace(norm_width=None) if m is not None]
    return jnp.min(jnp.concatenate([*flags, jnp.ones(1)]))


def _accumulated(
    cfg: ModelConfig, params: Params, batch: Any, masks: Masks | None, chunks: int, parts: int
) -> tuple[jax.Array, Params]:
    """Mean loss and its gradient over a batch, in `parts` parts."""
    total = jnp.sum(batch.weights_BT)

    def value(params: Params, rows: Any) -> jax.Array:
        tokens = (rows.inputs_BT, rows.targets_BT, rows.weights_BT, rows.segments_BT)
        return loss_sum(cfg, params, *tokens, masks, chunks) / total

    if parts == 1:
        return jax.value_and_grad(value)(params, batch)
    # Row i goes to part i mod parts, so that every device keeps its own rows.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

    def add(carry: tuple[jax.Array, Params], rows: Any) -> tuple[tuple[jax.Array, Params], None]:
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(value)(params, rows)), None

    zero = jnp.zeros((), jnp.promote_types(cfg.compute, jnp.float32))
    return jax.lax.scan(add, (zero, jax.tree.map(jnp.zeros_like, params)), split)[0]
