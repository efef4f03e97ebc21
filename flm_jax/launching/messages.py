"""What gcloud's messages say: whether an error may pass, whether something is missing, and which lines tell it.

The wording is that of gcloud 578.0.0 (August 2026), in `googlecloudsdk/command_lib/compute/tpus/` of its sources: an
error of the interface begins with the name of a status, a failure on a host with ``#####``, and what fails in one of
gcloud's threads, such as a key that the agent lacks, is the end of a traceback, with exit status 0.
"""

from __future__ import annotations

import re

# Numbers count as statuses of HTTP only where they are called that: names and quotas have numbers too.
_STATUS = r"(?:\b[Cc]ode[=: ]+|H(?:TTP|ttp) ?(?:[Ee]rror)? ?|[Ss]tatus[=: ]+)"
# What passes, in messages of gcloud or ssh themselves; what a program on a host prints, such as pip, says nothing.
_TRANSIENT = re.compile(
    rf"UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL\b|{_STATUS}(429|500|502|503|504)\b|rate limit|per minute|"
    r"[Cc]onnection (reset|refused|closed|timed out)|[Tt]imed? ?out|temporar|Could not (SSH|resolve)|"
    r"Remote end closed|exit(ed)? with return code \[?255"
)
# What somebody must change: a permission, a flag, how much the project may use (not: how often it may ask).
_REFUSED = re.compile(
    r"PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED|[Qq]uota (?!.*per minute).*(exceeded|exhausted)"
)
_OF_GCLOUD = re.compile(
    r"^(ERROR: (\(gcloud|gcloud crashed).*(\n(?!ERROR).*)*|ssh: .*|.*return code \[?255.*)", re.MULTILINE
)
_MISSING = re.compile(rf"\bNOT_FOUND\b|was not found|{_STATUS}404\b")
_EXISTS = re.compile(rf"\bALREADY_EXISTS\b|already exists|{_STATUS}409\b")
_TRACEBACK_END = re.compile(r"^[A-Za-z_]\w*(\.\w+)+: ")
_NO_KEY = re.compile(r"SSH [Kk]ey is not present in the SSH agent")
# Statuses of google.rpc.Code that a later request may not have: aborted, internal, unavailable, and the like.
_PASSING_CODES = frozenset({1, 2, 4, 8, 10, 13, 14})


class GcloudError(ValueError):
    """A command of gcloud failed.

    Attributes:
      transient: whether it may succeed later.
      missing: whether what it names does not exist.
      exists: whether what it makes exists already.
      output: what it had printed to stdout.
    """

    def __init__(self, said: str, transient: bool = False, output: str = "") -> None:
        super().__init__(said)
        self.missing, self.exists = bool(_MISSING.search(said)), bool(_EXISTS.search(said))
        self.transient, self.output = transient, output


class RequestFailedError(GcloudError):
    """The request for a machine failed, for a reason that somebody must remove first if it is not `transient`."""


def is_transient(errors: str) -> bool:
    """Whether gcloud or ssh name, in what a failed command printed to stderr, a reason that may pass."""
    found = [message[0] for message in _OF_GCLOUD.finditer(errors)]
    return any(_TRANSIENT.search(one) for one in found) and not any(_REFUSED.search(one) for one in found)


def may_pass(code: int, why: str) -> bool:
    """Whether another request may be granted after one that failed.

    Args:
      code: of google.rpc.Code; 0: it was not said.
      why: the message.
    """
    return not _REFUSED.search(why) and (code == 0 or code in _PASSING_CODES)


def lacks_key(errors: str) -> bool:
    """Whether gcloud asked no host, because the ssh agent does not hold the key."""
    return bool(_NO_KEY.search(errors))


def telling(errors: str) -> str:
    """The lines of what a failed command printed to stderr that say what is wrong, the last ones if none does."""
    lines = [line for line in errors.splitlines() if line.strip()]
    from_here = next((n for n, line in enumerate(lines) if "ERROR" in line or line.startswith("error:")), None)
    return "\n".join(lines[-3:] if from_here is None else lines[from_here:][:6])[:1000]


def warnings(errors: str) -> str:
    """What a command that ended with 0 printed to stderr about hosts that it left out; empty: nothing."""
    lines = [line.strip() for line in errors.splitlines()]
    found = [line for line in lines if line.startswith(("ERROR", "WARNING")) or _TRACEBACK_END.match(line)]
    return " ".join(dict.fromkeys(_TRACEBACK_END.sub("", line) for line in found))[:1000]
