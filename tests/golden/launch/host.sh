#!/usr/bin/env bash
# Written by experiments/launch_tpu.py: what every host of the launch tele-flm does.
set -euo pipefail

MARK=flm_launch:
home="$HOME"/flm_launch/tele-flm
digest=3c74bb101b0d05b2
release='flm_jax[tpu,data] @ git+https://example.org/flm_jax@v0.1.0'
workdir=/shared/tele-flm
nfs=10.0.0.2:/vol1
mount=/shared
constraints=(
  jax==0.12.0.1
)
# The output of the program goes to a file or a pipe, where Python would otherwise write in blocks.
environment=(
  PYTHONUNBUFFERED=1
  'LIBTPU_INIT_ARGS=--a=1 --b=2'
)
arguments=(
  --gin_file=my.gin
  '--gin_bindings=TextFolder.path = '"'"'/shared/my texts'"'"''
  --workdir=/shared/tele-flm
  --distributed
)
train=("$home/venv/bin/flm-train" "${arguments[@]}")

gin_files() {
  mkdir -p "$(dirname gin/my.gin)"
  cat >gin/my.gin <<'END_OF_GIN_FILE'
include 'base/first.gin'
END_OF_GIN_FILE
  mkdir -p "$(dirname gin/base/first.gin)"
  cat >gin/base/first.gin <<'END_OF_GIN_FILE'
Recipe.seed = 1  # "$HOME" `x`
END_OF_GIN_FILE
  :
}

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
