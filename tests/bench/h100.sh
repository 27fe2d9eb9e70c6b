#!/bin/bash
# What one H100 has to show of the package, in three stages of less than ten minutes each:
#
#     bash tests/bench/h100.sh 1      # then 2, then 3; OUT=FOLDER is where results go
#     bash tests/bench/h100.sh --small    # all three on a CPU, with tiny networks: 100 s of CPU time
#                                         # (measured), which two free cores share
#
# Without a network, BUNDLE names a folder (the one that the checkout is in, if it is not set) with
# `wheels/`, all packages of the core and of `experiments` in pyproject.toml and what they need, but
# torch and torchvision, which the machine has; and the embedded data: `data.tar.xz`, or `data/`,
# which is `_build/data` of a checkout in which `cmpt data build` has run.
set -eu -o pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
export H100_WORK=${H100_WORK:-${TMPDIR:-/tmp}/cmp-h100} OUT=${OUT:-$PWD/h100} OMP_NUM_THREADS=1
export CMP_BUILD=${CMP_BUILD:-$H100_WORK/build} PYTHONUNBUFFERED=1 PYTHONPATH=$root
mkdir -p "$H100_WORK" "$OUT" "$CMP_BUILD"

python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
bundle=${BUNDLE:-$root/..}
if [ -d "$bundle/wheels" ]; then
  site=$H100_WORK/site
  [ -d "$site" ] || "$python" -m pip install -q --no-index --no-deps --target "$site" \
    "$bundle"/wheels/*.whl
  PYTHONPATH=$site:$root
fi
if [ ! -e "$CMP_BUILD/data" ]; then
  if [ -e "$bundle/data.tar.xz" ]; then
    tar -xJf "$bundle/data.tar.xz" -C "$CMP_BUILD" # the folder data
  elif [ -d "$bundle/data" ]; then
    ln -s "$(cd "$bundle/data" && pwd)" "$CMP_BUILD/data"
  elif [ -d "$root/_build/data" ]; then
    ln -s "$root/_build/data" "$CMP_BUILD/data"
  else
    echo "h100.sh: no data in $CMP_BUILD/data, $bundle or $root/_build/data; run 'cmpt data build', or" \
      "set BUNDLE to a folder with data.tar.xz" >&2
    exit 2
  fi
fi

if [ "${1:-}" = --small ]; then
  # stage 3 mostly starts processes, so it runs beside the others, in folders of its own
  mkdir -p "$CMP_BUILD/beside"
  ln -sfn ../data "$CMP_BUILD/beside/data"
  H100_WORK=$H100_WORK/beside CMP_BUILD=$CMP_BUILD/beside \
    "$python" "$root/tests/bench/h100.py" 3 --small & beside=$!
  trap 'kill "$beside" 2>/dev/null || true' EXIT
  status=0
  "$python" "$root/tests/bench/h100.py" 1 2 --small || status=$?
  wait "$beside" || status=$?
  exit "$status"
fi
exec timeout 570 "$python" "$root/tests/bench/h100.py" "${1:?name a stage: 1, 2 or 3, or --small}"
