"""The script that runs on every host: install, start, status, log, stop, kill. One file of bash, which gcloud copies.

Every command may be given twice, because a lost connection does not tell whether the first one arrived: an attempt is
started once, and a run is asked to stop once (a second SIGTERM would end it without a save). The training program is
detached from the connection; it holds a lock while it runs, which the kernel drops however it ends.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from flm_jax.launching.description import Launch

MARK = "flm_launch:"
NOTHING = "-"  # the launch of a host on which nothing was installed
_LAST_LINE = "exit"

# What brings a release and the gin files onto a machine; manifests use it too.
_INSTALL = r"""
shared() {  # Mounts the file system that all hosts share, and checks that the work directory can be written to.
  if [ -n "$nfs" ] && ! mountpoint -q "$mount"; then
    # Upgrades lock apt for some minutes on a machine that has just started.
    for _ in 1 2 3 4 5 6 7 8 9 10; do
      if command -v mount.nfs >/dev/null; then break; fi
      { sudo apt-get -q update && sudo apt-get -q install -y nfs-common; } >&2 || sleep 30
    done
    sudo mkdir -p "$mount"
    sudo mount -t nfs -o rw,hard "$nfs" "$mount"
  fi
  if ! mkdir -p "$workdir" 2>/dev/null || [ ! -w "$workdir" ]; then
    echo "error: $(hostname): $(id -un) cannot write to $workdir" >&2
    return 1
  fi
}

python_of_host() {  # A Python that flm_jax runs on; many images have only an older one.
  local name
  for name in python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && "$name" -c 'import ensurepip, venv' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  python3 -m pip install --quiet --user uv >&2
  "$HOME/.local/bin/uv" python install --quiet 3.12 >&2
  "$HOME/.local/bin/uv" python find 3.12
}

install_here() {
  mkdir -p "$home"
  cd "$home"
  if [ "$(cat installed 2>/dev/null)" = "$digest" ]; then return; fi
  rm -f installed  # what another launch has installed here ends now, also if this installation fails
  if [ "$(cat environment 2>/dev/null)" != "$release ${constraints[*]-}" ]; then
    local python
    python=$(python_of_host)
    rm -rf venv environment
    "$python" -m venv venv
    printf '%s\n' "${constraints[@]-}" >constraints.txt
    local pip=(venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
    # Again, because hundreds of hosts ask at once; what is wrong is wrong the second time too.
    "${pip[@]}" "$release" || { sleep 20 && "${pip[@]}" "$release"; }
    echo "$release ${constraints[*]-}" >environment
  fi
  rm -rf gin
  mkdir gin
  gin_files
  echo "$digest" >installed
}
"""

# Bash reads a script while it executes it, and a new copy may be written over this one while a run is supervised.
# Therefore all of it is functions, and its last line leaves.
_BODY = r"""
# That a stop was asked for is kept in the work directory too: a machine that is taken away loses its disks. It holds
# until somebody asks for a new run, which forgets it first: so a stop also reaches a run that is still being installed.
stop_mark="$workdir/.flm_launch_stop_asked"

forget() {
  shared
  rm -f "$home/stop_asked" "$stop_mark"
  status
}

install() {
  mkdir -p "$home"
  chmod 600 "$self"  # --env may hold keys
  exec 7>"$home/installing"
  flock 7
  exec 8>"$home/starting"  # not in the middle of a start
  flock 8
  if running && [ "$(cat "$home/started")" != "$digest" ]; then  # it would lose its program and its recipe
    echo "error: $(hostname): launch $(cat "$home/started") runs under this name; stop it, or take another --name" >&2
    return 1
  fi
  exec 8>&-
  shared
  install_here
  if [ -e "$stop_mark" ]; then touch stop_asked; fi
  status
}

running() {  # A shared lock, so that two that ask at once do not take each other for the run.
  ! flock -n -s "$home/lock" true
}

start() {  # ATTEMPT; does nothing if a stop was asked for
  cd "$home"
  exec 8>starting
  flock 8
  exec 9>lock
  if [ "$(cat attempt 2>/dev/null)" != "$1" ]; then
    if ! flock -w 10 9; then  # it waits for those that ask whether it runs
      echo "error: $(hostname): attempt $1 was not started, because attempt $(cat attempt 2>/dev/null) still runs" >&2
      return 1
    fi
    shared
    if [ -e "$stop_mark" ]; then touch stop_asked; fi
    if [ ! -e stop_asked ]; then
      rm -f status pid signalled
      echo "$digest" >started
      echo "$1" >attempt
      setsid bash "$self" supervise </dev/null >>log 2>&1 7>&- 8>&- &
      disown
    fi
  fi
  exec 9>&-
  status
}

supervise() {  # Runs the training program, and keeps its exit status; it inherits the lock.
  cd "$home/gin"
  echo "$MARK attempt $(cat ../attempt) on $(hostname), $(date -u +%FT%TZ)"
  echo "$$" >../group
  env "${environment[@]}" "${train[@]}" &
  echo "$!" >../pid
  local code=0
  wait "$!" || code=$?
  echo "$MARK attempt $(cat ../attempt) on $(hostname) ended with exit status $code, $(date -u +%FT%TZ)"
  echo "$code" >../status.new
  mv ../status.new ../status
}

status() {
  local state=new attempt=0 code=- asked=0 of=-
  if [ -e "$home/installed" ]; then
    state=installed
    of=$(cat "$home/installed")
  fi
  if [ -e "$home/attempt" ]; then
    attempt=$(cat "$home/attempt")
    of=$(cat "$home/started")
    if running; then
      state=running
    elif [ -e "$home/status" ]; then
      state=ended
      code=$(cat "$home/status")
    else
      state=lost
    fi
  fi
  if [ -e "$home/stop_asked" ]; then asked=1; fi
  echo "$MARK host=$(hostname) state=$state attempt=$attempt status=$code asked=$asked launch=$of"
}

stop() {
  mkdir -p "$home"
  cd "$home"
  exec 8>starting  # not in the middle of a start
  flock 8
  touch stop_asked
  touch "$stop_mark" 2>/dev/null || true  # before an installation has mounted it, there may be no such folder
  local waited=0
  while running && [ ! -s pid ] && [ "$waited" -lt 50 ]; do
    sleep 0.1
    waited=$((waited + 1))
  done
  if running && [ ! -e signalled ]; then
    touch signalled
    kill -TERM "$(cat pid)" || true
  fi
  status
}

kill_all() {  # The supervisor and everything that it started are one process group.
  cd "$home"
  if running; then
    kill -KILL -- "-$(cat group)" || true
    flock lock true
  fi
  status
}

log() {  # LINES [follow]
  if [ ! -e "$home/log" ]; then
    echo "error: $(hostname): nothing was started yet, so there is no log" >&2
    if [ $# -eq 1 ]; then return 1; fi
  fi
  if [ $# -gt 1 ]; then
    exec tail -n "$1" -F "$home/log"
  fi
  tail -n "$1" "$home/log"
}

self=$(readlink -f "$0")
case "${1:-}" in
  forget) forget ;;
  install) install ;;
  start) start "$2" ;;
  supervise) supervise ;;
  status) status ;;
  log) log "${@:2}" ;;
  stop) stop ;;
  kill_all) kill_all ;;
  *)
    echo "usage: $0 forget | install | start ATTEMPT | status | log LINES [follow] | stop | kill_all" >&2
    exit 2
    ;;
esac
exit
"""


@dataclass(frozen=True)
class Report:
    """What one host says of the launch.

    Attributes:
      host: its name.
      state: new, installed, running, ended, or lost (it was started, does not run, and left no exit status).
      attempt: the number of the last start.
      status: the exit status, if it ended.
      asked: whether it was asked to stop.
      launch: the digest of the launch that it was installed or started for.
    """

    host: str
    state: str
    attempt: int
    status: int | None
    asked: bool
    launch: str


def reports(output: str) -> list[Report]:
    """The reports in what a command printed on all hosts, by host."""
    pattern = rf"{MARK} host=(\S+) state=(\w+) attempt=(\d+) status=(-|\d+) asked=([01]) launch=(\S+)"
    found = {}
    for host, state, attempt, status, asked, launch in re.findall(pattern, output):
        code = None if status == "-" else int(status)
        found[host] = Report(host, state, int(attempt), code, asked == "1", launch)
    return [found[host] for host in sorted(found)]


def script_name(launch: Launch) -> str:
    """The script's name, in the home directory of every host."""
    return f"flm_launch_{launch.name}.sh"


def command(launch: Launch, *words: object) -> str:
    """The shell command that calls the script on a host; a host that has none yet reports that it is new."""
    name = script_name(launch)
    call = shlex.join(["bash", name, *map(str, words)])
    # A copy that was interrupted lacks the end, and counts as none.
    there = f'[ "$(tail -n 1 {name} 2>/dev/null)" = {_LAST_LINE} ]'
    if words[0] == "log":
        none = 'echo "error: $(hostname): nothing was installed yet, so there is no log" >&2; exit 1'
        return f"if {there}; then {call}; else {none}; fi"
    if words[0] not in ("status", "stop", "kill_all"):
        return call
    home = f"flm_launch/{launch.name}"
    mark = f"mkdir -p {home}; touch {home}/stop_asked; " if words[0] == "stop" else ""
    asked = f"$(test -e {home}/stop_asked && echo 1 || echo 0)"
    new = f'"{MARK} host=$(hostname) state=new attempt=0 status=- asked={asked} launch={NOTHING}"'
    return f"if {there}; then {call}; else {mark}echo {new}; fi"


def _array(name: str, words: tuple[str, ...]) -> str:
    lines = "".join(f"\n  {shlex.quote(word)}" for word in words)
    return f"{name}=({lines}\n)" if words else f"{name}=()"


def _gin_files_function(launch: Launch) -> str:
    """A function of bash that writes the recipe's gin files into the folder ``gin``."""
    lines = ["gin_files() {"]
    for name, text in launch.files:
        path, end = f"gin/{name}", "END_OF_GIN_FILE"
        while end in text.splitlines():
            end += "_"
        lines.append(f'  mkdir -p "$(dirname {shlex.quote(path)})"')
        lines += [f"  cat >{shlex.quote(path)} <<'{end}'", text.rstrip("\n"), end]
    return "\n".join([*lines, "  :", "}"])


def variables(launch: Launch) -> str:
    """Bash that sets the variables of a launch."""
    nfs = launch.nfs
    lines = [
        f'home="$HOME"/{shlex.quote(f"flm_launch/{launch.name}")}',
        f"digest={launch.digest}",
        f"release={shlex.quote(launch.release)}",
        f"workdir={shlex.quote(launch.workdir)}",
        f"nfs={shlex.quote(f'{nfs.server}:{nfs.export}' if nfs else '')}",
        f"mount={shlex.quote(nfs.mount if nfs else '')}",
        _array("constraints", launch.constraints),
        "# The output of the program goes to a file or a pipe, where Python would otherwise write in blocks.",
        _array("environment", ("PYTHONUNBUFFERED=1", *launch.env)),
        _array("arguments", launch.train_arguments),
        'train=("$home/venv/bin/flm-train" "${arguments[@]}")',
    ]
    return "\n".join(lines)


def preamble(launch: Launch) -> str:
    """Bash that sets the variables of a launch, and defines the functions that install it."""
    return f"{variables(launch)}\n\n{_gin_files_function(launch)}\n{_INSTALL}"


def script(launch: Launch) -> str:
    """The script for the hosts of a launch."""
    head = [
        "#!/usr/bin/env bash",
        f"# Written by experiments/launch_tpu.py: what every host of the launch {launch.name} does.",
        "set -euo pipefail",
        "",
        f"MARK={shlex.quote(MARK)}",
    ]
    return "\n".join(head) + "\n" + preamble(launch) + _BODY
