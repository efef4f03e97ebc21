"""A hub of the Hugging Face hub's protocol on this machine, with faults: models and data by commit, files by range."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 500
OTHER = "fedcba9876543210fedcba9876543210fedcba98"


@dataclass
class Hub:
    """The server, running, and what it has; tests change it while it runs.

    Attributes:
      models: the files of each commit, by repository and revision; a branch is an entry with the files of a commit. A
        repository of data is named datasets/org/name.
      heads: the commit of each revision, by repository and revision.
      gated: repositories whose files are refused without a token.
      down: the status of every answer; 0: as it should be.
      cut: by file name, how many bytes of it are sent until the connection breaks; how often, by `breaks`.
      breaks: how many more times that happens.
      sending: called with a file's name and the position before each PIECE of it is sent.
      asked: method, path and range of each request.
    """

    url: str = ""
    models: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    heads: dict[tuple[str, str], str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    down: int = 0
    cut: dict[str, int] = field(default_factory=dict)
    breaks: int = 0
    sending: Callable[[str, int], None] = lambda name, at: None
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, repository: str, folder: Path, commit: str = COMMIT, revision: str = "main") -> None:
        """Takes in the files of a folder, as a commit."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.models.setdefault(repository, {})[commit] = files
        self.heads[repository, revision] = self.heads[repository, commit] = commit

    @property
    def fetched(self) -> set[str]:
        """The names of the files whose content was asked for."""
        return {path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path}


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection; `hub` is set by a subclass."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, *args):
        pass

    def _answer(self):
        hub, (path, _, _) = self.hub, self.path.partition("?")
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if hub.down:
            return self._refuse(hub.down, "")
        api, data = path.startswith("/api/"), "/datasets/" in path
        parts = path.removeprefix("/api").removeprefix("/models").removeprefix("/datasets").lstrip("/").split("/", 4)
        if len(parts) < 4:
            return self._refuse(404, "")
        owner, name, what, revision, *file = parts
        repository, revision = f"{'datasets/' * data}{owner}/{name}", revision.replace("%2F", "/")
        if repository not in hub.models:
            # As the hub answers whoever is not logged in, so that nobody learns which private repositories exist.
            return self._refuse(401, "RepoNotFound")
        commit = hub.heads.get((repository, revision))
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        files = hub.models[repository][commit]
        if api and what == "revision":
            listed = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            return self._json({"id": repository, "sha": commit, "siblings": listed})
        if api and what == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return self._json(_inside(entries, *file) if data else entries)
        if repository in hub.gated and "Authorization" not in self.headers:
            return self._refuse(401, "GatedRepo")
        if file[0] not in files:
            return self._refuse(404, "EntryNotFound")
        return self._file(file[0], files[file[0]], commit)

    def _refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _file(self, name, content, commit):
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.hub.cut and self.hub.breaks:
            self.hub.breaks -= 1
            self.wfile.write(content[first : first + self.hub.cut[name]])
            self.close_connection = True
            return
        with contextlib.suppress(OSError):  # who asked may have hung up
            for at in range(first, len(content), PIECE):
                self.hub.sending(name, at)
                self.wfile.write(content[at : at + PIECE])


def _inside(entries, folder=""):
    """The files and folders in a folder, without what lies in those."""
    found = {}
    for entry in entries:
        if entry["path"].startswith(folder):
            name, _, deeper = entry["path"].removeprefix(folder).lstrip("/").partition("/")
            path = f"{folder}/{name}".lstrip("/")
            found[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} if deeper else entry
    return list(found.values())


@contextlib.contextmanager
def hub_server():
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def hub_here(patch, cache: Path):
    """A hub that this process takes for the only one, with an empty cache; `patch` undoes it after the test."""
    from huggingface_hub import constants

    from flm_jax.data import hub as client

    with hub_server() as hub:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
        client.find.cache_clear()
        yield hub
        client.find.cache_clear()
