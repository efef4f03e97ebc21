"""Tracking services: Weights & Biases, MLflow and trackio, each a configuration for `Run.tracker`.

Their packages are optional, and imported where a run begins at the service. A run that is resumed goes on in its own
run there; steps after the restored checkpoint are sent again, with the same values.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flm_jax.records import flattened, recorded
from flm_jax.tracking.writer import Measurement

# Seconds that opening and ending may take.
OPENING, ENDING = 60, 45
# The most parameters that MLflow takes in one request, and the characters of one.
_PARAMETERS, _CHARACTERS = 100, 500


class About(NamedTuple):
    """What a service is told about a run.

    Attributes:
      name: of the work directory.
      key: the same for every start of this run, and for no other run.
      workdir: the work directory.
      settings: of the run, JSON-able.
    """

    name: str
    key: str
    workdir: Path
    settings: Mapping[str, Any]


class Service(Protocol):
    """A run at a service. Calls may wait for a network and may fail in any way; one thread makes all of them."""

    def write(self, measured: Measurement) -> None:
        """Sends one measurement."""
        ...

    def close(self, failed: bool) -> None:
        """Ends the run, as failed or as finished."""
        ...


class Tracker(Protocol):
    """What every configuration of a service offers."""

    @property
    def package(self) -> str:
        """The Python package that it needs."""
        ...

    def begin(self, about: About) -> tuple[Service, str]:
        """Begins a run at the service or goes on with it; returns it, and a sentence on where to look."""
        ...


def check_installed(tracker: Tracker | None) -> None:
    """Checks that the package of a service can be imported.

    Raises:
      ValueError: it is not installed; the message says what to install.
    """
    if tracker is None or tracker.package in sys.modules or importlib.util.find_spec(tracker.package) is not None:
        return
    name, package = type(tracker).__name__, tracker.package
    raise ValueError(
        f"Run.tracker = @{name}() needs the package {package}, which is not installed: pip install {package}, or, in a "
        f"checkout, pip install -e '.[{package}]'."
    )


@dataclass(frozen=True)
@recorded
class Wandb:
    """Measurements at Weights & Biases.

    Attributes:
      project: of the run.
      name: of the run; empty: that of the work directory.
      offline: whether they are written into the work directory, to send later with `wandb sync`; otherwise log in
        first, with `wandb login`.
    """

    package = "wandb"

    project: str = "flm_jax"
    name: str = ""
    offline: bool = False

    def begin(self, about: About) -> tuple[Service, str]:
        """See Tracker."""
        import wandb

        mode = "offline" if self.offline else os.environ.get("WANDB_MODE", "online")
        # Without a key it would ask for one, on the terminal that shows the run's progress.
        if mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("nobody is logged in: run `wandb login`, or bind Wandb.offline = True")
        limits = wandb.Settings(console="off", silent=True, init_timeout=OPENING, finish_timeout=ENDING)
        run = wandb.init(
            project=self.project,
            name=self.name or about.name,
            id=about.key,
            resume="allow",
            dir=about.workdir,
            mode=mode,
            config=dict(about.settings),
            settings=limits,
        )
        # Its own step only rises; ours goes back to the restored checkpoint when a killed run is resumed.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        if run.offline:
            return _WandbRun(run), f"Weights & Biases, offline: wandb sync {Path(run.dir).parent}"
        return _WandbRun(run), f"Weights & Biases: {run.url}"


class _WandbRun(NamedTuple):
    run: Any

    def write(self, measured: Measurement) -> None:
        self.run.log({**measured.finite(), "step": measured.total.steps})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


@dataclass(frozen=True)
@recorded
class Mlflow:
    """Measurements in MLflow.

    Attributes:
      experiment: that the run belongs to; it is made if it does not exist.
      name: of the run; empty: that of the work directory.
      uri: of a server or a local store, such as 'sqlite:///mlflow.db'; empty: what the environment says
        (MLFLOW_TRACKING_URI), or MLflow's own choice.
    """

    package = "mlflow"

    experiment: str = "flm_jax"
    name: str = ""
    uri: str = ""

    def begin(self, about: About) -> tuple[Service, str]:
        """See Tracker."""
        import mlflow
        from mlflow.entities import Param

        # It tries again for minutes, and would say so each time.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        uri = self.uri or mlflow.get_tracking_uri()
        client = mlflow.MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(self.experiment)
        experiment = known.experiment_id if known else client.create_experiment(self.experiment)
        found = client.search_runs([experiment], f"tags.flm_jax = '{about.key}'", max_results=1)
        if found:
            run = found[0].info.run_id
            client.update_run(run, status="RUNNING")
        else:
            tags = {"flm_jax": about.key}
            run = client.create_run(experiment, run_name=self.name or about.name, tags=tags).info.run_id
            settings = flattened(about.settings).items()
            given = [Param(re.sub(r"[^\w\-. :/]", "_", name), str(value)[:_CHARACTERS]) for name, value in settings]
            for first in range(0, len(given), _PARAMETERS):
                client.log_batch(run, params=given[first : first + _PARAMETERS])
        web = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run}"
        where = web if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
        return _MlflowRun(client, run), f"MLflow: {where}"


class _MlflowRun(NamedTuple):
    client: Any
    run: str

    def write(self, measured: Measurement) -> None:
        from mlflow.entities import Metric

        when, step = int(measured.time * 1000), measured.total.steps
        self.client.log_batch(self.run, metrics=[Metric(n, v, when, step) for n, v in measured.finite().items()])

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


@dataclass(frozen=True)
@recorded
class Trackio:
    """Measurements in trackio, on this machine or in a Space of Hugging Face.

    Attributes:
      project: of the run.
      name: of the run; empty: that of the work directory. A key is added, because trackio finds runs by their names.
      space: the Space to send to, such as 'me/flm'; empty: what the environment says (TRACKIO_SPACE_ID), or this
        machine.
    """

    package = "trackio"

    project: str = "flm_jax"
    name: str = ""
    space: str = ""

    def begin(self, about: About) -> tuple[Service, str]:
        """See Tracker."""
        import trackio

        run = trackio.init(
            project=self.project,
            name=f"{self.name or about.name}-{about.key}",
            space_id=self.space or None,
            resume="allow",
            config=dict(about.settings),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        where = f"in the Space {self.space}" if self.space else f"trackio show --project {self.project}"
        return _TrackioRun(run), f"trackio: {where}"


class _TrackioRun(NamedTuple):
    run: Any

    def write(self, measured: Measurement) -> None:
        self.run.log(measured.finite(), step=measured.total.steps)

    def close(self, failed: bool) -> None:
        del failed  # it has no such state
        self.run.finish()
