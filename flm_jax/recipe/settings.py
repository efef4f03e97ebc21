"""What a recipe says: what is computed (`Recipe`, its `Stage`s), and how it is run (`Run`).

A work directory belongs to one recipe: every number in it follows from the recipe, and continuing with another one is
refused. A run's settings, such as the mesh or how often it saves, may change from one start to the next, and so may the
few fields of a recipe that change no number (metadata ``{"compared": False}``), such as how often it measures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from flm_jax.config import ModelConfig
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import SeqioTask
from flm_jax.data.train_vocabulary import Pretrained, SentencePiece
from flm_jax.distillation import Teacher
from flm_jax.growth.plan import Growth
from flm_jax.growth.trained import TRAINED
from flm_jax.guards import GradientAlarm, SpikeGuard, Watchdog
from flm_jax.optimizer import OptimizerConfig
from flm_jax.records import meant, recorded
from flm_jax.records.fields import Name, NonNegative, Positive, Seed, Size, one_of
from flm_jax.sharding import MeshConfig
from flm_jax.tracking import Mlflow, Trackio, Wandb


@dataclass(frozen=True)
@recorded
class Stage:
    """One model, trained for some steps.

    Attributes:
      name: for reports and directories.
      model: the model's configuration.
      steps: optimizer steps.
      batch_size: windows per step, in all processes together.
      optimizer: the optimizer's configuration.
      growth: how the model grows from that of the stage before; None: it continues with that model. A first stage
        without a growth is initialised, or continues with the model of `Recipe.start`.
      accumulate: parts that a batch is split into, one after the other.
      train: all, or new: only the entries that the model's last growth added (as in LLaMA-Pro, 2401.02415); what was
        there before stays as it is, bit for bit. The growth is the stage's own, or that of the stage or checkpoint
        that it continues.
      teacher: a frozen model that this one learns from too; None: it learns from the text alone.
      source_weights: of the sources of a `Mixture` by name, from the stage's start to its end; a source that is not
        named is not read. None: the mixture's own weights.
      z_loss: weight of the mean of (log Z)^2 in what is minimised, where Z is the sum of the exponentials of a token's
        logits (PaLM, 2204.02311, section 5, has 1e-4); the loss that is reported stays without it. 0: none.
    """

    name: Name
    model: ModelConfig
    steps: Size
    batch_size: Size
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    growth: Growth | None = None
    accumulate: Size = 1
    train: Annotated[str, one_of(TRAINED)] = "all"
    teacher: Teacher | None = None
    source_weights: Mapping[str, NonNegative] | None = None
    z_loss: NonNegative = 0.0


@dataclass(frozen=True)
@recorded
class Recipe:
    """A run from the first stage to the last: everything that determines its numbers.

    Attributes:
      stages: in order; the first is initialised or begins with `start`, the others grow or continue.
      data: corpus, vocabulary, context. A vocabulary that is not named is that of `start`.
      seed: for initialisation and for entries drawn by a growth.
      loss_chunks: parts of a window that the head runs on, one at a time.
      tolerance: largest relative difference of logits that a preserving growth may show, in float32.
      eval_windows: held-out windows that the loss is measured on.
      eval_every: steps between measurements; each stage also measures at its start and end.
      start: a checkpoint that the first stage continues with, or grows from, if it has a growth; empty: none. The data
        starts from its beginning, the report leaves out what was spent before, and the checkpoint must be there
        whenever the run is resumed.
      spike_guard: what rewinds the run at a spike of the loss, and skips batches; None: nothing does.
    """

    stages: tuple[Stage, ...]
    data: DataConfig = field(default_factory=DataConfig)
    seed: Seed = 0
    loss_chunks: Size = 1
    tolerance: NonNegative = field(default=1e-5, metadata={"compared": False})
    eval_windows: Size = 256
    eval_every: Size = field(default=50, metadata={"compared": False})
    # The path may change: the checkpoint is identified by its digest, which is recorded.
    start: str = field(default="", metadata={"identity": False})
    spike_guard: SpikeGuard | None = None

    def __post_init__(self) -> None:
        if self.data.vocabulary is None:
            goes_on = self.start and not isinstance(self.data.corpus, SeqioTask)  # which has its own vocabulary
            vocabulary = Pretrained(self.start) if goes_on else SentencePiece()
            object.__setattr__(self, "data", dataclasses.replace(self.data, vocabulary=vocabulary))


@dataclass(frozen=True)
@recorded
class Run:
    """How a recipe is run: nothing here changes what is computed, except for rounding on another mesh.

    Attributes:
      mesh: how devices are laid out.
      meshes: the same for stages that need another layout, by the stage's name.
      compiler_options: XLA's options for train steps on TPUs, and on GPUs those that begin with xla_gpu_; elsewhere
        they are left out.
      checkpoint_every: steps between checkpoints; each stage also saves at its start and end.
      keep: checkpoints of a stage that are kept, besides its first and last.
      log_every: steps between entries in metrics.jsonl and the event files.
      max_bad_steps: non-finite steps in a row, each skipped, before the run stops.
      max_loss: times the loss of a uniform guess over the vocabulary; a step with a greater loss stops the run.
      prompt: beginning of the text that is sampled at the end of the run.
      sample_tokens: length of that sample.
      tracker: a service that measurements are also sent to; None: they are only in files of the work directory.
      verify_data: MB per second that a thread of each process reads to verify the whole token store while the run
        trains; 0: a block is verified when it is first read, and no other. Unless it is 0, the start also reads texts
        that have not changed.
      gradient_alarm: when the gradient's norm is told to be too large; None: never.
      watchdog: when a process says that something takes too long, and may end; None: never.
    """

    mesh: MeshConfig = field(default_factory=MeshConfig)
    meshes: Mapping[str, MeshConfig] = field(default_factory=dict)
    compiler_options: Mapping[str, str] = field(default_factory=dict)
    checkpoint_every: Size = 100
    keep: Size = 2
    log_every: Size = 10
    max_bad_steps: Size = 3
    max_loss: Positive = 3.0
    prompt: str = "def "
    sample_tokens: Size = 120
    tracker: Wandb | Mlflow | Trackio | None = None
    verify_data: NonNegative = 0.0
    gradient_alarm: GradientAlarm | None = field(default_factory=GradientAlarm)
    watchdog: Watchdog | None = field(default_factory=Watchdog)

    def mesh_of(self, stage: Stage) -> MeshConfig:
        """How devices are laid out for a stage."""
        return self.meshes.get(stage.name, self.mesh)

    def check(self, recipe: Recipe) -> None:
        """Checks the names of stages in `meshes`.

        Raises:
          ValueError: a stage is named that the recipe does not have.
        """
        names = [stage.name for stage in recipe.stages]
        if unknown := sorted(set(self.meshes) - set(names)):
            near = meant(unknown[0], names)
            raise ValueError(f"Run.meshes names {', '.join(unknown)}; the stages are {', '.join(names)}{near or '.'}")
