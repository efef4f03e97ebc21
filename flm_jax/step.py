"""The jitted programs of one stage: initialisation, growth, and the train step."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from flm_jax import attention
from flm_jax.compiler_options import for_step
from flm_jax.distillation import distilled_sums
from flm_jax.growth.grow import grow_opt_state, grow_params
from flm_jax.growth.lineage import Lineage
from flm_jax.growth.rescaling import paced, rescaled_optimizer, rescaling
from flm_jax.loss import by_source, loss_sum, source_sums
from flm_jax.model import Masks, Params, declared, init_params
from flm_jax.optimizer import in_form, schedule
from flm_jax.recipe import ResolvedStage
from flm_jax.sharding import replicated
from flm_jax.state import TrainState, abstract_state, shardings_of

# The loss of a step and, with a teacher, the divergence `kl`; and the function of parameters and rows of a batch that
# gives what is minimised, and these.
Measured = tuple[jax.Array, dict[str, jax.Array]]
Objective = Callable[[Params, Any], tuple[jax.Array, Measured]]


class Metrics(struct.PyTreeNode):
    """Measurements of one step, each () float32.

    `mask` is the smallest value of any growth mask (1 without masks); `bad` is 1 if the step was skipped because its
    loss, gradient or update was not finite. Of steps with a teacher, `kl` is the divergence from it, in nats per token,
    and `kl_weight` its weight; `loss` is the cross-entropy in any case. Of steps on a mixture without a teacher,
    `source_losses_S` is the loss on the rows of each source; NaN where the batch has none.
    """

    loss: jax.Array
    grad_norm: jax.Array
    update_norm: jax.Array
    param_norm: jax.Array
    learning_rate: jax.Array
    mask: jax.Array
    bad: jax.Array
    kl: jax.Array | None = None
    kl_weight: jax.Array | None = None
    source_losses_S: jax.Array | None = None

    def by_name(self, sources: Sequence[str] = ()) -> dict[str, float]:
        """The measurements as numbers; the loss of each source that the batch had rows of is `name/loss`."""
        found = {name: x for name, x in vars(jax.device_get(self)).items() if x is not None}
        losses = found.pop("source_losses_S", np.full(len(sources), np.nan))
        own = {f"{name}/loss": float(x) for name, x in zip(sources, losses, strict=True) if np.isfinite(x)}
        return {**{name: float(x) for name, x in found.items()}, **own}


@contextlib.contextmanager
def quietly_donated() -> Iterator[None]:
    """Silences the warning about donated buffers that no output can reuse; in a growth most cannot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        yield


def make_grower(
    lineage: Lineage,
    mesh: Mesh,
    donate: bool = False,
    weights: bool = False,
    optimizer: str = "adamw",
    train: str = "all",
) -> Any:
    """The jitted function (state before the growth, key) -> state of the grown model at step 0.

    Args:
      lineage: of the grown model.
      mesh: the mesh of both states.
      donate: whether the given state is donated. Leaves that keep their shape and sharding then reuse their memory, for
        example the embedding if only the depth grows. Other leaves cannot, and XLA warns (see `quietly_donated`).
      weights: whether the state has no optimizer state.
      optimizer: whose state the grown one is. If the growth takes over no moments, the given one may be another's.
      train: what will train, which decides about moments (see `Stage.train`); the given state may have others.
    """
    target = abstract_state(lineage, mesh, weights, optimizer, train)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), target.opt_state)

    def grow_opt(state: Any) -> Any:
        if weights:
            return ()
        if lineage.last_growth.optimizer == "fresh":
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        return grow_opt_state(lineage, state, like)

    def grow_state(state: TrainState, key: jax.Array) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=grow_params(lineage, state.params, key),
            opt_state=grow_opt(state.opt_state),
        )

    return jax.jit(grow_state, donate_argnums=(0,) if donate else (), out_shardings=shardings_of(target))


def parameter_growers(lineage: Lineage, mesh: Mesh) -> Iterator[Any]:
    """For each parameter, the jitted function (all parameters before the growth, key) -> this parameter, grown."""
    for number, where in enumerate(jax.tree.leaves(shardings_of(abstract_state(lineage, mesh, weights=True).params))):

        def one(params: Params, key: jax.Array, number: int = number) -> jax.Array:
            grown: jax.Array = jax.tree.leaves(grow_params(lineage, params, key))[number]
            return grown

        yield jax.jit(one, out_shardings=where)


class StageProgram:
    """The jitted functions of one stage, with the shapes and shardings of its state.

    Attributes:
      stage: the stage.
      mesh: the mesh that it runs on.
      trained: what of the model trains.
      abstract_state: shapes and shardings of its `TrainState`.
    """

    def __init__(
        self, stage: ResolvedStage, mesh: Mesh, chunks: int, compiler_options: Mapping[str, str] | None = None
    ) -> None:
        self.stage, self.mesh, self.chunks = stage, mesh, chunks
        self.options = for_step(mesh, stage.cfg, compiler_options)
        self.trained = stage.trained
        self.abstract_state = abstract_state(stage.lineage, mesh, optimizer=stage.optimizer.name, train=stage.train)
        self.shardings = shardings_of(self.abstract_state)
        self.rate = schedule(stage.optimizer, stage.steps)

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer; after a growth with `optimizer="exact"`, it needs to know where new layers were placed."""
        signatures, scaling = declared(self.stage.cfg)[1], rescaling(self.stage.lineage)
        part = None if scaling is None else self.trained.part(scaling)
        return rescaled_optimizer(self.stage.optimizer, self.stage.cfg, self.trained.part(signatures), part)

    def check_trains(self, context: int) -> None:
        """Checks that the mesh splits batches and teacher evenly, and that its devices have the attention kernel.

        Raises:
          ValueError: it does not, or they have not; the message names the stage, and what works.
        """
        stage, mesh = self.stage, self.mesh
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if context % mesh.shape["sequence"]:
            fits = [n for n in range(1, context + 1) if context % n == 0]
            sequence = mesh.shape["sequence"]
            near = [n for n in fits if n < sequence][-1:] + [n for n in fits if n > sequence][:1]
            raise ValueError(
                f"Stage {stage.name!r}: MeshConfig.sequence={sequence} does not divide the context of {context} "
                f"tokens; the nearest sizes that do are {' and '.join(map(str, near))}."
            )
        if stage.batch_size % (shards * stage.accumulate):
            raise ValueError(
                f"Stage {stage.name!r}: batch_size={stage.batch_size} must be a multiple of data x fsdp x "
                f"accumulate = {shards * stage.accumulate}, such as "
                f"{-(-stage.batch_size // (shards * stage.accumulate)) * shards * stage.accumulate}."
            )
        models = [("", stage.cfg)] + ([] if stage.teacher is None else [("its teacher: ", stage.teacher.cfg)])
        with jax.set_mesh(mesh):
            for whose, cfg in models:
                try:
                    attention.check(cfg, stage.batch_size // stage.accumulate, context)
                except ValueError as error:
                    raise ValueError(f"Stage {stage.name!r}: {whose}{error}") from None
        self.abstract_teacher()

    def initialiser(self) -> Any:
        """The jitted function key -> state of a first stage at step 0."""

        def initialise(key: jax.Array) -> TrainState:
            params = init_params(self.stage.cfg, key)
            return TrainState(jnp.zeros((), jnp.int32), params, self.tx.init(self.trained.part(params)))

        return jax.jit(initialise, out_shardings=self.shardings)

    @property
    def state_before(self) -> TrainState:
        """Shapes and shardings of the state that the stage's growth is given, on the stage's mesh."""
        stage = self.stage
        form: dict[str, Any] = {"optimizer": stage.optimizer_before, "train": stage.trained_before}
        return abstract_state(stage.lineage.before, self.mesh, **form)

    def grower(self, donate: bool = False) -> Any:
        """The jitted function (state before the growth, key) -> state of the stage at step 0; see `make_grower`."""
        stage = self.stage
        return make_grower(stage.lineage, self.mesh, donate, optimizer=stage.optimizer.name, train=stage.train)

    def continued(self, state: TrainState) -> TrainState:
        """The state of a stage before with the same model, as the first state of this stage.

        Moments that it lacks are 0, and those of parameters of which nothing trains any more are left out.
        """
        step, moments = jnp.zeros_like(state.step), in_form(state.opt_state, self.abstract_state.opt_state)
        # The stage before may have used another mesh; if not, this moves nothing.
        moved: TrainState = jax.device_put(TrainState(step, state.params, moments), self.shardings)
        return moved

    def masks(self, step: int | jax.Array) -> Masks | None:
        """The growth masks after `step` steps; None from the end of the ramp on, so that programs have no masks."""
        if isinstance(step, int) and step >= self.stage.ramp_steps:
            return None
        return self.stage.lineage.masks(step + (self.stage.since_growth or 0))

    def _paced(self, updates: Params, state: TrainState) -> Params:
        """The updates, with those of new entries scaled by their own rate if the growth is "asymmetric"."""
        growth = self.stage.growth
        if growth is None or growth.optimizer != "asymmetric":
            return updates
        since, count = state.step + (self.stage.since_growth or 0), optax.tree_utils.tree_get(state.opt_state, "count")
        return paced(self.stage.optimizer, self.stage.lineage, updates, since, count)

    def abstract_teacher(self) -> Params | None:
        """Shapes, dtypes and shardings of the weights of the stage's teacher, or None.

        Raises:
          ValueError: the mesh does not divide one of its axes.
        """
        if self.stage.teacher is None:
            return None
        try:
            return self.stage.teacher.abstract(self.mesh)
        except ValueError as error:
            raise ValueError(f"Stage {self.stage.name!r}: its teacher: {error}") from None

    def _objective(
        self, batch: Any, masks: Masks | None, teacher: Params | None, weight: jax.Array | None
    ) -> tuple[Objective, Measured]:
        """What a step minimises, for rows of the batch, and zeros like what it measures."""
        cfg, total = self.stage.cfg, jnp.sum(batch.weights_BT)
        zero = jnp.zeros((), jnp.promote_types(cfg.compute, jnp.float32))

        def of_text(params: Params, rows: Any) -> tuple[jax.Array, Measured]:
            tokens = (rows.inputs_BT, rows.targets_BT, rows.weights_BT, rows.segments_BT)
            loss = loss_sum(cfg, params, *tokens, masks, self.chunks) / total
            return loss, (loss, {})

        resolved = self.stage.teacher
        if teacher is None or weight is None or resolved is None:
            if batch.sources is None:
                return of_text, (zero, {})
            weights_S = by_source(jnp.sum(batch.weights_BT, axis=1), batch.sources)

            def of_mixture(params: Params, rows: Any) -> tuple[jax.Array, Measured]:
                sums_S = source_sums(cfg, params, rows, masks, self.chunks)
                loss = jnp.sum(sums_S) / total
                return loss, (loss, {"source_losses_S": sums_S / weights_S})

            return of_mixture, (zero, {"source_losses_S": jnp.zeros(weights_S.shape, zero.dtype)})
        temperature = resolved.teacher.temperature

        def of_both(params: Params, rows: Any) -> tuple[jax.Array, Measured]:
            sums = distilled_sums(cfg, params, resolved.cfg, teacher, rows, masks, self.chunks, temperature)
            loss, kl = sums[0] / total, sums[1] / total
            return (1 - weight) * loss + weight * temperature**2 * kl, (loss, {"kl": kl})

        return of_both, (zero, {"kl": zero})

    def step_function(self, masked: bool) -> Any:
        """The train step, not jitted: (state, batch, pace, teacher) -> (next state, metrics).

        If the loss, the gradient or the update is not finite, only the step count changes. `pace` multiplies the
        learning rate: runs that differ in their rate alone can be mapped over it. Entries that do not train
        (`Stage.train`) keep their values and their moments, bit for bit, and count in no norm but that of parameters.
        `teacher` are the weights of the stage's teacher (see `abstract_teacher`); without them the program has none.
        """
        trained = self.trained

        def step(
            state: TrainState, batch: Any, pace: jax.Array | float = 1.0, teacher: Params | None = None
        ) -> tuple[TrainState, Metrics]:
            masks = self.masks(state.step) if masked else None
            old = trained.part(state.params)
            weight = None if teacher is None or self.stage.teacher is None else self.stage.teacher.weight_at(state.step)
            objective, zero = self._objective(batch, masks, teacher, weight)

            def of_moving(moving: Params, rows: Any) -> tuple[jax.Array, Measured]:
                return objective(trained.whole(moving, state.params), rows)

            (loss, taught), grads = _accumulated(of_moving, zero, old, batch, self.stage.accumulate)
            grads = trained.select(grads)
            # No entry that stays may have an effect on those that train, through a moment either.
            updates, opt_state = self.tx.update(grads, trained.select_moments(state.opt_state), old)
            rate = jnp.asarray(self.rate(state.step) * pace, jnp.float32)
            updates = jax.tree.map(lambda u: -rate.astype(u.dtype) * u, self._paced(updates, state))
            updates = trained.select(updates)
            grad_norm = optax.tree.norm(grads)
            update_norm = optax.tree.norm(updates)
            good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
            new = trained.select(optax.apply_updates(old, updates), old)
            part, opt_state = jax.tree.map(
                lambda after, before: jnp.where(good, after, before),
                (new, trained.select_moments(opt_state, state.opt_state)),
                (old, state.opt_state),
            )
            metrics = Metrics(
                loss=loss,
                grad_norm=grad_norm,
                update_norm=update_norm,
                param_norm=optax.tree.norm(state.params),
                learning_rate=rate,
                mask=_lowest(masks),
                bad=1.0 - good,
                **taught,
                kl_weight=weight,
            )
            return TrainState(state.step + 1, trained.whole(part, state.params), opt_state), metrics

        return step

    def stepper(self, masked: bool) -> Any:
        """The jitted train step (state, batch) -> (next state, metrics); the given state is donated."""
        out = (self.shardings, replicated(self.mesh))
        step = self.step_function(masked)
        return jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=self.options)


def _lowest(masks: Masks | None) -> jax.Array:
    """The smallest value of any mask; 1 without masks."""
    flags = [] if masks is None else [m for m in masks._replace(norm_width=None) if m is not None]
    return jnp.min(jnp.concatenate([*flags, jnp.ones(1)]))


def _accumulated(
    objective: Objective, zero: Measured, params: Params, batch: Any, parts: int
) -> tuple[Measured, Params]:
    """What an objective measures on a batch, and its gradient, accumulated over `parts` parts of the batch."""

    def derived(rows: Any) -> tuple[Measured, Params]:
        (_, measured), grads = jax.value_and_grad(objective, has_aux=True)(params, rows)
        return measured, grads

    if parts == 1:
        return derived(batch)
    # Row i goes to part i mod parts, so that no row has to move to another device.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

    def add(carry: tuple[Measured, Params], rows: Any) -> tuple[tuple[Measured, Params], None]:
        return jax.tree.map(jnp.add, carry, derived(rows)), None

    found: tuple[Measured, Params] = jax.lax.scan(add, (zero, jax.tree.map(jnp.zeros_like, params)), split)[0]
    return found
