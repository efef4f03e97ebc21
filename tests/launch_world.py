"""A launch on the stand-in for gcloud: what tests of launching start, disturb and look at."""

import json
import os
import re
import time
from pathlib import Path

from flm_jax.launching.description import Launch, machine_of
from flm_jax.launching.gcloud import Gcloud
from flm_jax.launching.tpu import Tpu, Watch
from tests import fake_gcloud, fake_hosts

MARK = ".flm_launch_stop_asked"  # in the work directory: a stop was asked for


class World:
    """The stand-in, and a launch on it."""

    def __init__(self, root, monkeypatch):
        fake_hosts.make(root)
        self.cloud, self.workdir = root / "cloud", root / "shared/run"
        self.workdir.parent.mkdir()
        monkeypatch.setenv("PATH", f"{root / 'path'}:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_GCLOUD", str(self.cloud))
        monkeypatch.setattr(fake_gcloud, "ROOT", self.cloud)
        self.said = []

    def launch(self, **changes):
        fields = {
            "name": "demo",
            "machine": machine_of("v4-16", None),
            "zone": "us-central2-b",
            "release": "flm_jax[tpu]==0.1.0",
            "workdir": str(self.workdir),
            "gin_files": ("my.gin",),
            "files": (("my.gin", "x = 1\n"),),
            "runtime": "tpu-ubuntu2204-base",
        }
        return Launch(**fields | changes)

    def tpu(self, launch=None, patience=1.0, **watch):
        cloud = Gcloud(self.said.append, pause=0.01, patience=patience)
        return Tpu(launch or self.launch(), cloud, Watch(**{"poll": 0.05} | watch))

    def faults(self, *faults):
        fake_gcloud.store("faults.json", faults)

    def there(self, launch=None):
        """Makes the machine, as if an earlier `run` or `create` had done so."""
        self.tpu(launch).create()
        fake_gcloud.store("state.json", {"queue": ["ACTIVE"]})
        (self.cloud / "calls.jsonl").unlink()

    def counts(self, *verbs):
        """How often each was asked."""
        found = self.verbs()
        return [found.count(verb) for verb in verbs]

    def calls(self):
        """The commands that were given, the paths of copied files cut to their names."""
        path = self.cloud / "calls.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [[Path(word).name if word.endswith(".sh") else word for word in line] for line in lines]

    def verbs(self):
        """What was asked of gcloud, and of the hosts' script."""
        found = []
        for call in self.calls():
            asked = re.findall(r"bash flm_launch_demo.sh ([a-z_]+(?: \d+)?)", " ".join(call))
            found.append(asked[0] if asked else call[4] if call[3] == "queued-resources" else f"{call[3]} {call[4]}")
        return found

    def started(self):
        return [line.split()[0] for line in (self.workdir / "started").read_text().splitlines()]

    def wait_for(self, what, seconds=120):
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.said
            time.sleep(0.02)

    def last(self, step):
        """Tells the training program which step is the last one."""
        (self.workdir / "last.new").write_text(str(step))
        (self.workdir / "last.new").replace(self.workdir / "last")

    def steps(self):
        """Whether every host has begun to train."""
        logs = list(self.cloud.glob("hosts/*/flm_launch/demo/log"))
        return len(logs) == 2 and all("step" in log.read_text() for log in logs)
