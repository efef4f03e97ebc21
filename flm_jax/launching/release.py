"""What is installed on every host: a pinned release, so that hosts that are made later get the same code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_HOW = (
    "give flm_jax==VERSION, git+https://HOST/OWNER/flm_jax@TAG_OR_COMMIT, or the absolute path of a wheel on a file "
    "system that all hosts share"
)
_VERSION = r"[0-9][0-9A-Za-z.+!]*"


def requirement(release: str, extras: tuple[str, ...]) -> str:
    """What pip is asked for.

    Args:
      release: a version, a tag or commit of a repository, or a wheel: see the message of the error.
      extras: parts of the installation, such as tpu and data.

    Raises:
      ValueError: it is none of these, or one that may change.
    """
    wanted = f"flm_jax[{','.join(extras)}]" if extras else "flm_jax"
    if match := re.fullmatch(rf"flm[_-]jax==({_VERSION})", release):
        return f"{wanted}=={match[1]}"
    if match := re.match(r"(git\+https://)[^/\s]*@|(git\+ssh://)[^/@:\s]*:[^/@\s]*@", release):
        # Without the release itself: it would show the password.
        raise ValueError(
            f"--release={match[1] or match[2]}... names a user, and perhaps a password or token, which logs and pip on "
            "every host would show: give an address without it, or a wheel on a file system that all hosts share."
        )
    if match := re.fullmatch(r"(git\+(?:https|ssh|file)://\S+?)@([^@\s]+)", release):
        if not re.fullmatch(r"[0-9a-f]{40}|v?[0-9]+(\.[0-9]+)+\S*", match[2]):
            raise ValueError(
                f"--release={release}: {match[2]} may be a branch, which moves; give a tag such as v0.1.0, or a commit "
                "of 40 hex digits."
            )
        return f"{wanted} @ {release}"
    if re.fullmatch(r"/\S+\.whl", release):
        return f"{wanted} @ file://{release}"
    raise ValueError(f"--release={release} is not pinned: {_HOW}.")


def of_checkout(root: Path) -> str:
    """The commit of a git checkout, as a release, if every host can fetch it.

    Raises:
      ValueError: it is no checkout of a repository that hosts can read, or holds what is not committed or not pushed.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        top, commit, origin = (
            git("rev-parse", "--show-toplevel"),
            git("rev-parse", "HEAD"),
            git("remote", "get-url", "origin"),
        )
        changed, pushed = (
            git("status", "--porcelain", "--untracked-files=no"),
            git("branch", "-r", "--contains", "HEAD", "--list", "origin/*"),  # hosts clone that one
        )
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(
            f"There is no --release, and {root} is no git checkout with a remote 'origin': {_HOW}."
        ) from None
    if Path(top) != root.resolve() or not re.fullmatch(r"https://[^@\s]+", origin):
        raise ValueError(f"There is no --release, and hosts cannot clone {root} by https without a password: {_HOW}.")
    if changed or not pushed:
        what = "has changes that are not committed" if changed else "is at a commit that is not pushed"
        raise ValueError(f"There is no --release, and {root} {what}, so hosts cannot get it: push it, or {_HOW}.")
    return f"git+{origin}@{commit}"


def constraint_lines(text: str) -> tuple[str, ...]:
    """The lines of a requirements file that pin something."""
    lines = (line.split(" #")[0].strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))
