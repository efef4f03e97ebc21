"""Programs that hosts of the stand-in for gcloud find on their PATH, and a training program that counts steps.

The training program takes $LAST steps of 50 ms. At SIGTERM it saves its count in the work directory and exits with 75,
unless a second signal comes meanwhile. A file `behave` there makes it exit at once with the status in it, `last` tells
which step is the last one.
"""

import stat
import sys
from pathlib import Path

TRAIN = r"""#!/usr/bin/env bash
for word in "$@"; do case "$word" in --workdir=*) workdir=${word#--workdir=} ;; esac; done
echo "$(hostname) $*" >>"$workdir/started"
[ -e "${1#--gin_file=}" ] || exit 2
if [ -e "$workdir/behave" ]; then code=$(cat "$workdir/behave"); rm "$workdir/behave"; exit "$code"; fi
saved="$workdir/saved-$(hostname)"
count=$(cat "$saved" 2>/dev/null || echo 0)
save() {
  trap 'exit 143' TERM
  sleep 0.7
  echo "$count" >"$saved"
  echo "saved at $count"
  exit 75
}
trap save TERM
last=${LAST:-8}
while [ "$count" -lt "$last" ]; do
  if [ -e "$workdir/last" ]; then last=$(<"$workdir/last"); fi
  count=$((count + 1))
  echo "step $count"
  sleep 0.05
done
echo "$count" >"$saved"
"""

# Stands in for a Python of the host: `-m venv` and pip make an environment with the training program.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip install "*)
    echo "$*" >>"$HOME/pip"
    cp "$(command -v train)" "$(dirname "$0")/flm-train"
    ;;
esac
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def make(root):
    """Makes the folder of a stand-in for gcloud, and the folder that goes on the PATH to find it."""
    program = Path(__file__).resolve().with_name("fake_gcloud.py")
    write(root / "path/gcloud", f'#!/usr/bin/env bash\nexec {sys.executable} -S -E {program} "$@"\n')
    write(root / "cloud/bin/hostname", '#!/usr/bin/env bash\necho "$FAKE_HOSTNAME"\n')
    write(root / "cloud/bin/python3.13", PYTHON)
    write(root / "cloud/bin/train", TRAIN)
