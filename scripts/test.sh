#!/usr/bin/env bash
# Everything CI runs: formatting, lint, types, the documentation site, tests. Sets itself up.
#
#   bash scripts/test.sh                      all of it
#   bash scripts/test.sh -k parity            options go to pytest
#   bash scripts/test.sh --python PATH ...    with another Python, in an environment of its own
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

if [ "${1:-}" = --python ]; then
  python=${2:?--python needs the path of an interpreter}
  shift 2
  make_environment test "$python"
else
  make_environment test
fi
bin="$VENV/bin"
install_slurm

"$bin/ruff" format --check --quiet .
"$bin/ruff" check --quiet .
"$bin/mypy" &
types=$!
NO_MKDOCS_2_WARNING=1 "$bin/mkdocs" build # strict: links and anchors too. With --quiet no warning counts
wait $types
if [ $# -gt 0 ]; then
  exec "$bin/python" -m pytest "$@"
fi
# What runs in one process, two files at a time; then what runs several ranks, which need the cores.
"$bin/python" -m pytest --numprocesses 2 --dist loadfile tests/unit
# Tests on the cluster wait most of the time: they run beside those of several ranks, and their output follows.
# So do those of odd input, in a process of their own: their watch over what code does cannot be taken back.
said=$(mktemp)
{
  "$bin/python" -m pytest tests/fuzz
  "$bin/python" -m pytest tests/slurm tests/chaos
} > "$said" 2>&1 &
beside=$! status=0
trap 'kill $beside 2> /dev/null || true; rm -f "$said"' EXIT
"$bin/python" -m pytest tests/distributed tests/gpu tests/te_stand_in || status=$?
wait $beside || status=$?
cat "$said"
exit $status
