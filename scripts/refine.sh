#!/usr/bin/env bash
# Refinement of translations in stages, from message catalogues to figures: docs/guides/refine.md. It may be
# interrupted and started again. Options go to benchmarks/refine/stages.py: --seeds 1 makes it shorter.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment refine
# Their catalogues alone are read; what they depend on is not needed.
"$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-deps \
  polib==1.2.0 django==5.2.19 wagtail==8.0.1
exec "$VENV/bin/python" benchmarks/refine/stages.py --work-dir runs/refine \
  --json runs/refine/refine.json --picture runs/refine/refine.png "$@"
