"""Repositories of the Hugging Face hub: named as org/name@revision, found at one commit, fetched into the hub's cache.

A file or directory of the same name comes first, so no command that reads a path changes its meaning. The library
huggingface_hub is imported when a repository is looked up, and knows the cache, the token, mirrors (HF_ENDPOINT) and
HF_HUB_OFFLINE. Nothing that is fetched is run.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flm_jax.files import atomic_write, missing_room

MAIN = "main"
# Seconds that the hub has for its first answer; a network that drops packets would keep a program waiting for minutes.
PATIENCE = 10.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<repository>(?P<owner>{_PART})/{_PART})(?:@(?P<revision>[^@\s\0]+))?")


class HubError(OSError):
    """A repository cannot be fetched; the message says why, and what to do."""


class Name(NamedTuple):
    """The name of a repository, and the branch, tag or commit that was asked for."""

    repository: str
    revision: str = MAIN

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


def named(text: str | Path) -> Name | None:
    """The repository that a text names; None if it is a path.

    A `Path` is one. A text is one if something lies there. Without @revision it is also one if its first part is a
    directory here: 'runs/dmeo' is more likely mistyped than a repository, and is not sent to anybody.
    """
    found = None if isinstance(text, Path) else _match(text)
    if found is None or os.path.lexists(text) or (found["revision"] is None and Path(found["owner"]).is_dir()):
        return None
    return Name(found["repository"], found["revision"] or MAIN)


def advice(text: str | Path) -> str:
    """What to say, as an added sentence, about a path with nothing there: how a repository would be named."""
    found = _match(str(text))
    if found is None:
        return " A repository of the Hugging Face hub is named as org/name or org/name@revision."
    return (
        f" There is a directory {found['owner']}, so it was taken for a path; the repository of that name is "
        f"{text}@{MAIN}."
    )


def _match(text: str) -> re.Match[str] | None:
    found = _NAME.fullmatch(text)
    # What the hub allows in no name, and git in no revision.
    wrong = found is None or "--" in found["repository"] or ".." in text or found["repository"].endswith(".git")
    return None if wrong else found


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit.

    Attributes:
      name: what was asked for.
      commit: the commit that this was, 40 hex digits.
      files: the size of each file, in bytes, by its path in the repository.
      cached: why the hub was not asked, and the cache is all there is; '' if it was.
      directory: of the commit in the cache, if that is all there is.
      listed: whether `files` are all that the repository has; otherwise they are those that the cache holds, which does
        not know whether there are more.
    """

    name: Name
    commit: str
    files: Mapping[str, int]
    cached: str = ""
    directory: Path | None = None
    listed: bool = True

    @property
    def origin(self) -> str:
        """The name to record: repository and commit."""
        return f"{self.name.repository}@{self.commit}"

    def fetch(self, wanted: Iterable[str]) -> Path:
        """Fetches files that are not in the cache yet.

        Files that are complete stay in the cache, so that the same call goes on where an interrupted one ended.

        Args:
          wanted: paths of files of the repository.

        Returns:
          The directory of the commit in the cache. It may hold other files too.

        Raises:
          HubError: the repository has no such file, there is no room, or the hub does not give the files.
        """
        wanted = sorted(set(wanted))
        if lacking := [file for file in wanted if file not in self.files]:
            raise self._lacks(lacking)
        directory = self.directory or self._download(wanted)
        if lacking := [file for file in wanted if not (directory / file).is_file()]:
            raise self._lacks(lacking)
        return directory

    def _download(self, wanted: list[str]) -> Path:
        import huggingface_hub
        from huggingface_hub import constants

        repository, cache, here = (
            self.name.repository,
            Path(constants.HF_HUB_CACHE),
            huggingface_hub.try_to_load_from_cache,
        )
        new = [file for file in wanted if not isinstance(here(repository, file, revision=self.commit), str)]
        there = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
        if missing := missing_room(there, sum(self.files[file] for file in new)):
            raise HubError(f"{self.name}: {missing}, or set HF_HUB_CACHE to another directory.")
        get = functools.partial(
            huggingface_hub.snapshot_download, repository, revision=self.commit, allow_patterns=wanted
        )
        try:
            with _told(self.name, "the download broke off"):
                directory = Path(_interruptible(get))
        except _UnreachableError as error:
            raise HubError(
                f"{self.origin}: {error}. Run the same command again: the files that are complete are kept."
            ) from error
        if self.name.revision != self.commit:
            with contextlib.suppress(OSError):  # so that the name is found offline too, as after other downloads
                atomic_write(directory.parents[1] / "refs" / self.name.revision, self.commit)
        return directory

    def _lacks(self, files: list[str]) -> HubError:
        listed = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
        if self.cached and not (self.listed and set(files) - set(self.files)):
            return HubError(f"{self.origin}: {self.cached}, and the cache lacks {listed}. {_by_hand(self.name)}")
        return HubError(f"{self.origin} has no {listed}: give another repository or revision.")


def _interruptible(download: Callable[..., str]) -> str:
    """What a download returns; an interrupt ends it in the middle of a file and removes that part."""
    from huggingface_hub.utils import tqdm

    stopped = threading.Event()

    class Bar(tqdm):
        """A progress bar; the threads that fetch files call it for every piece."""

        def update(self, n: float | None = 1) -> Any:
            if stopped.is_set():
                raise InterruptedError("the download was interrupted")
            return super().update(n)

    pool = concurrent.futures.ThreadPoolExecutor(1)
    running = pool.submit(download, tqdm_class=Bar)
    try:
        return running.result()
    except KeyboardInterrupt:
        stopped.set()
        concurrent.futures.wait([running], timeout=PATIENCE)
        raise
    finally:
        pool.shutdown(wait=False)


@functools.cache
def find(name: Name) -> Snapshot:
    """Finds the commit that a name stands for. It stays the same until the program ends.

    Raises:
      HubError: there is no such repository or revision, it may not be read, or the hub cannot be reached and the cache
        does not hold it.
    """
    from huggingface_hub import HfApi

    try:
        with _told(name, "the hub cannot be reached"):
            info = HfApi(library_name="flm_jax").model_info(
                name.repository, revision=name.revision, files_metadata=True, timeout=PATIENCE
            )
            files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    except _UnreachableError as error:
        return _in_cache(name, str(error))
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise HubError(f"{name}: the hub's answer has no commit; if HF_ENDPOINT is set, check that it is a hub.")
    return Snapshot(name, info.sha, files)


@functools.cache
def dataset_commit(name: Name) -> str:
    """The commit that the name of a repository of data stands for, until the program ends. A commit is not asked for.

    Raises:
      HubError: there is no such repository or revision, it may not be read, or the hub cannot be reached.
    """
    if _COMMIT.fullmatch(name.revision):
        return name.revision
    from huggingface_hub import HfApi

    try:
        with _told(name, "the hub cannot be reached"):
            info = HfApi(library_name="flm_jax").dataset_info(name.repository, revision=name.revision, timeout=PATIENCE)
    except _UnreachableError as error:
        raise HubError(
            f"{name}: {error}. If the data of a commit is in the cache of the library datasets, give all 40 digits of "
            "that commit after the @; or give a directory that save_to_disk wrote."
        ) from error
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise HubError(f"{name}: the hub's answer has no commit; if HF_ENDPOINT is set, check that it is a hub.")
    return info.sha


def _in_cache(name: Name, reason: str) -> Snapshot:
    """The repository as the cache holds it, where the hub cannot be asked."""
    import huggingface_hub
    from huggingface_hub import constants

    try:
        found = huggingface_hub.snapshot_download(
            name.repository, revision=name.revision, allow_patterns=[], local_files_only=True
        )
    except OSError:
        raise HubError(f"{name}: {reason}, and {constants.HF_HUB_CACHE} does not hold it. {_by_hand(name)}") from None
    root = Path(found)
    files = _listed(root)
    if files is not None:
        return Snapshot(name, root.name, files, reason, root)
    there = {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()}
    return Snapshot(name, root.name, there, reason, root, listed=False)


def _listed(snapshot: Path) -> dict[str, int] | None:
    """The files, with their sizes, of the repository whose commit a directory of a cache holds, all or some of them.

    A download begins by writing down which there are, so this is known of one that broke off too. None: it is not, as
    of files that other programs have fetched one by one; or the directory lies in no cache.
    """
    repository = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/")
    if snapshot.parent.name != "snapshots" or not _COMMIT.fullmatch(snapshot.name) or _match(repository) is None:
        return None
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.get_cached_repo_tree(repository, revision=snapshot.name, cache_dir=snapshot.parents[2])
    except errors.CachedRepoTreeNotFoundError:
        return None
    return {file.path: file.size for file in found}


def check_whole(directory: Path, wanted: Iterable[str]) -> None:
    """Refuses a directory of the hub's cache that lacks files because their download broke off.

    Args:
      directory: any; one that lies in no cache passes, and so does one whose cache does not know what there is.
      wanted: names of files that are read from it where the repository has them.

    Raises:
      HubError: it lacks some of them.
    """
    there = directory.expanduser().resolve()
    lacking = [file for file in wanted if file in (_listed(there) or ()) and not (there / file).exists()]
    if lacking:
        raise HubError(
            f"{directory} is a repository of the Hugging Face hub that was not fetched whole: it lacks "
            f"{', '.join(lacking)}. Give its name, org/name@{there.name}, where there is a network, and the rest is "
            "fetched."
        )


def _by_hand(name: Name) -> str:
    return (
        f"Where there is a network, run `hf download {name.repository} --revision {name.revision} --local-dir DIR`; "
        "copy DIR here and give it in place of the name."
    )


class _UnreachableError(HubError):
    """The hub did not answer, or cannot at the moment; the message is the reason."""


@contextlib.contextmanager
def _told(name: Name, otherwise: str) -> Iterator[None]:
    """A context in which an error of the library becomes a sentence; `otherwise` begins that of an unforeseen one.

    Raises:
      _UnreachableError: before anything was fetched, if the cache may do instead.
      HubError: for every other reason.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{name.repository} is gated: accept its terms on its page, then log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may read it."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{name.repository} has no revision {name.revision!r}: give a branch, a tag or a whole commit after the @; "
            f"without one it is {MAIN}."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _unknown(name) from error
    except errors.OfflineModeIsEnabled as error:
        raise _UnreachableError("HF_HUB_OFFLINE is set, so the hub is not asked") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise _unknown(name) from error
        raise _UnreachableError(f"{otherwise} (status {status})") from error
    except Exception as error:  # of the network, in a class of whatever HTTP library huggingface_hub uses
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _UnreachableError(f"{otherwise} ({reason:.200})") from error


def _unknown(name: Name) -> HubError:
    return HubError(
        f"There is no directory {name.repository} here, and the hub shows no repository of that name: check it, or, if "
        "it is private, log in with `hf auth login` or set HF_TOKEN."
    )


def origin(text: str | Path) -> str | None:
    """The repository and commit that a text stands for, if `named` takes it for a repository; as `find`."""
    name = named(text)
    return None if name is None else find(name).origin
