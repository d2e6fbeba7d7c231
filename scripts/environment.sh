# Sourced by the other scripts: makes the checkout's own virtual environment, once.
#
#   install_slurm                       for tests/slurm, by apt, as root
#   make_environment EXTRAS [PYTHON]    e.g. make_environment "" ; make_environment test /usr/bin/python3.12
#
# Sets VENV. Versions are pinned by scripts/constraints.txt. A second call finds it done.

make_environment() {
  local extras=$1 python=${2:-python3} suffix="" stamp wanted options=() constraints=()
  if [ $# -gt 1 ]; then
    suffix="-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" || return 1
  fi
  VENV="$PWD/.venv$suffix"
  "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "$("$python" --version): megatron-ladder needs Python 3.11 to 3.13" >&2
    return 2
  }
  if "$python" -c 'import transformer_engine' 2>/dev/null; then
    options=(--system-site-packages) # a GPU image: keep its torch and Transformer Engine
  else
    constraints=(--constraint scripts/constraints.txt)
  fi
  stamp="$VENV/installed${extras:+-$extras}"
  wanted=$(cat pyproject.toml scripts/constraints.txt | cksum)
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return 0

  # An installation that was cut off leaves no stamp and may be half of a package: start afresh.
  if [ -d "$VENV" ] && [ -z "$(ls "$VENV"/installed* 2>/dev/null)" ]; then
    [ -e "$VENV/made-by-megatron-ladder" ] || {
      echo "$VENV was not made by these scripts: move it away, or work in another checkout" >&2
      return 2
    }
    rm -rf "$VENV"
  fi
  echo "Installing into $VENV (a minute or two)"
  mkdir -p "$VENV"
  touch "$VENV/made-by-megatron-ladder"
  [ -x "$VENV/bin/python" ] || "$python" -m venv "${options[@]}" "$VENV"
  "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "${constraints[@]}" \
    --editable ".${extras:+[$extras]}"
  echo "$wanted" >"$stamp"
}

# SLURM's daemons, which tests/slurm starts as a private cluster. Where they cannot be had, those tests are
# skipped and say so.
install_slurm() {
  PATH="$PATH:/usr/sbin:/sbin" command -v slurmctld slurmd munged sbatch >/dev/null && return 0
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
  echo "Installing SLURM for its tests"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
    --no-install-recommends slurm-wlm munge; } >/dev/null 2>&1 ||
    echo "SLURM could not be installed: its tests are skipped" >&2
}
