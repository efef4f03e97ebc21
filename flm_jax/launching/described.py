"""What Google Cloud says of a machine: the state of the request for it, and of each slice.

Fields and states are those of the REST resources `projects.locations.queuedResources` and `projects.locations.nodes` of
version 2, as the interface of gcloud 578.0.0 (August 2026) describes them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

GONE = ("SUSPENDED", "FAILED")  # states of a request that gets no machine any more, and costs nothing
_LOST = ("PREEMPTED", "TERMINATED")  # states of a node that can never be used again


@dataclass(frozen=True)
class Request:
    """A queued resource.

    Attributes:
      state: such as WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED.
      why: why it failed; empty: it did not, or it is not said.
      code: of google.rpc.Code, why it failed; 0: not said.
      by_user: whether a user, and not Google Cloud, has suspended it.
    """

    state: str
    why: str = ""
    code: int = 0
    by_user: bool = False


@dataclass(frozen=True)
class Node:
    """A slice.

    Attributes:
      name: its name.
      state: such as READY or PREEMPTED; UNKNOWN: not said; MISSING: there is none.
      health: such as HEALTHY or UNHEALTHY_MAINTENANCE; empty: not said.
      hosts: number of its hosts; 0: not said.
    """

    name: str
    state: str
    health: str = ""
    hosts: int = 0

    @property
    def lost(self) -> bool:
        """Whether it is gone, and does not come back."""
        return self.state in (*_LOST, "MISSING")

    @property
    def ready(self) -> bool:
        """Whether its hosts should answer, as far as is said."""
        return self.state in ("READY", "UNKNOWN") and not self.health.startswith("UNHEALTHY")

    def __str__(self) -> str:
        return f"{self.name} is {self.state}{f', {self.health}' if self.health else ''}"


def request_of(described: str) -> Request:
    """The request that `gcloud.describe` printed; its state is UNKNOWN where that cannot be read."""
    state = _at(_read(described), "state")
    error = _at(_at(state, "failedData"), "error")
    name, code = _at(state, "state"), _at(error, "code")
    return Request(
        state=name if isinstance(name, str) and name else "UNKNOWN",
        why=str(_at(error, "message") or ""),
        code=code if isinstance(code, int) else 0,
        by_user=_at(state, "stateInitiator") == "USER",
    )


def node_of(name: str, described: str) -> Node:
    """The slice that a command of `gcloud.describe_nodes` printed; a host has an endpoint in each of its networks."""
    found = _read(described)
    endpoints, networks = _at(found, "networkEndpoints"), _at(found, "networkConfigs")
    each = max(len(networks), 1) if isinstance(networks, list) else 1
    return Node(
        name=name,
        state=str(_at(found, "state") or "UNKNOWN"),
        health=str(_at(found, "health") or ""),
        hosts=len(endpoints) // each if isinstance(endpoints, list) else 0,
    )


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _at(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None
