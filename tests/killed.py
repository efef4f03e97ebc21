"""Runs a program, counts its writes by Python's audit events, and kills it at a chosen one: for test_faults.py.

It imports nothing that the program would not, and changes nothing that it computes.

python tests/killed.py SETTINGS PROGRAM ARGUMENTS: SETTINGS is JSON with
  roots: folders by name; writes elsewhere do not count.
  log: a file; every write becomes a line of it: seconds, its group, and what it was.
  group, number, delay: where to kill: `delay` seconds after the write of this number, from 1, in this group; at the
    latest when the program has begun this group and comes to the next one.
"""

import collections
import json
import os
import re
import runpy
import signal
import sys
import threading
import time

_CHANGES = {"os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.truncate": 0}
_DRAFT = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


def written(event, arguments):
    """The path that an audit event is about to change; None: it changes none."""
    if event == "open":
        path, mode, flags = arguments
        if not (set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR)):
            return None
    elif event in _CHANGES:
        path = arguments[_CHANGES[event]]
    else:
        return None
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else None


def group_of(path, roots):
    """What a path belongs to: a step of a stage, an entry of the cache, or another file; None: it lies elsewhere.

    An old step that is deleted, which happens during the save of a newer one, is another file.
    """
    for name, root in roots.items():
        if path.startswith(root + "/"):
            if ".deleted" in path:
                return f"{name}/deleted"
            parts = path[len(root) + 1 :].split("/")
            step = re.match(r"\d+", parts[2]) if len(parts) > 2 and parts[0] == "checkpoints" else None
            if step:
                return f"{name}/{parts[1]}/{step[0]}"
            draft = _DRAFT.fullmatch(parts[0])
            return f"{name}/{draft[1] if draft else parts[0]}"
    return None


def kill(delay):
    """Ends this process after some seconds as `kill -9` does."""
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def main():
    """See the module."""
    settings = json.loads(sys.argv[1])
    log = os.open(settings["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    roots, wanted, counts = settings["roots"], settings.get("group"), collections.Counter()

    def hook(event, arguments):
        path = written(event, arguments)
        group = path and group_of(path, roots)
        if group:
            counts[group] += 1
            os.write(log, f"{time.monotonic():.6f}\t{group}\t{event} {path}\n".encode())
            if group == wanted and counts[group] == settings["number"]:
                if settings["delay"]:
                    threading.Thread(target=kill, args=(settings["delay"],), daemon=True).start()
                else:
                    kill(0)
            elif group != wanted and counts[wanted] and (group.startswith("cache/") or group.count("/") == 2):
                kill(0)

    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(sys.argv[0])  # noqa: PTH120
    sys.addaudithook(hook)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
