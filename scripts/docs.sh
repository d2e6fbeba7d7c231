#!/usr/bin/env bash
# The documentation site, from docs/ and the docstrings of megatron_ladder. Sets itself up.
#
#   bash scripts/docs.sh          builds it into site/: open site/index.html
#   bash scripts/docs.sh serve    shows it at http://127.0.0.1:8000 (with search), and builds it again on changes
#
# A broken link, anchor or reference ends the build; scripts/test.sh builds it, too.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment docs
export NO_MKDOCS_2_WARNING=1 # the theme's notice of its end of life: docs/reference/dependencies.md
if [ "${1:-}" = serve ]; then
  exec "$VENV/bin/mkdocs" serve "${@:2}"
fi
exec "$VENV/bin/mkdocs" build "$@" # not --quiet: no warning would count then
