"""The jitted programs of a stage, with the shapes and shardings of its state."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flm_jax import attention
from flm_jax.compiler_options import for_step
from flm_jax.growth.rescaling import paced, rescaled_optimizer, rescaling
from flm_jax.model import Masks, Params, declared, init_params
from flm_jax.optimizer import in_form, schedule
from flm_jax.recipe import ResolvedStage
from flm_jax.sharding import replicated
from flm_jax.state import TrainState, abstract_state, shardings_of
from flm_jax.step.growers import make_grower
from flm_jax.step.metrics import Metrics, lowest, part_norms
from flm_jax.step.objective import Measured, accumulated, objective_of


class StageProgram:
    """The jitted functions of one stage, with the shapes and shardings of its state.

    Attributes:
      stage: the stage.
      mesh: the mesh that it runs on.
      trained: what of the model trains.
      abstract_state: shapes and shardings of its `TrainState`.
      log_every: steps between those that measure what a step measures at a cost.
    """

    def __init__(
        self,
        stage: ResolvedStage,
        mesh: Mesh,
        chunks: int,
        compiler_options: Mapping[str, str] | None = None,
        log_every: int = 1,
    ) -> None:
        self.log_every = log_every
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

    def _logged(self, step: jax.Array) -> jax.Array | None:
        """Whether the step after `step` steps is logged, () bool; None: no growth adds entries to measure."""
        if self.stage.growth is None:
            return None
        return ((step + 1) % self.log_every == 0) | (step + 1 == self.stage.steps)

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
            objective, zero = objective_of(self.stage, self.chunks, batch, masks, teacher, weight)

            def of_moving(moving: Params, rows: Any) -> tuple[jax.Array, Measured]:
                return objective(trained.whole(moving, state.params), rows)

            (loss, taught), grads = accumulated(of_moving, zero, old, batch, self.stage.accumulate)
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
                mask=lowest(masks),
                bad=1.0 - good,
                parts=part_norms(trained, self._logged(state.step), grads, updates, state.params),
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
