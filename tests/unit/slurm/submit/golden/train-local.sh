#!/bin/bash
# Written by `megatron-ladder submit`; docs/guides/slurm.md says what each part is for.
# shellcheck disable=SC2016 # text in single quotes is data, not code
#SBATCH --job-name=ladder-ladder
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
# A job that waits for a failed one ends: without this it would wait for ever.
#SBATCH --kill-on-invalid-dep=yes
# After a node's failure SLURM starts the job again; one log holds all its starts.
#SBATCH --requeue
#SBATCH --open-mode=append
# SLURM sends SIGUSR1 to this script (B:) 120 s before the time limit: time for a checkpoint.
#SBATCH --signal=B:USR1@120

cd -- /home/me || exit 2
set -u
export PYTHONUNBUFFERED=1 # lines reach the log at once
export OMP_NUM_THREADS=1 # a thread for each core of the rank, not of the node

command=(
  python3 -P -m pretrain.cli train --nproc-per-node 2 --preset paper-1b --data.paths /data --output-dir runs/ladder
)

run=/shared/runs/ladder
folder=/shared/runs/ladder/slurm/1
restarts_without_progress=3 # after so many, it gives up

note() { # writes a line to the log and to the history, which `megatron-ladder status` reads
  printf '%(%FT%T)T %s\n' -1 "$*" | tee -a "$folder/history"
}
newest_checkpoint() {
  local path newest=none
  for path in "$run"/checkpoints/step_*; do # in order
    [[ $path =~ /step_([0-9]+)$ ]] && newest=${BASH_REMATCH[1]}
  done
  echo "$newest"
}
ends_at() { # prints how many of the last starts ended with this checkpoint as the newest
  local count=0 what status checkpoint
  while read -r _ what status checkpoint _; do
    [ "$what" = end ] || continue
    if [ "$checkpoint" = "$1" ]; then count=$((count + 1)); else count=0; fi
  done <"$folder/history"
  echo "$count"
}
ended_at="" ended_here=0
give_up_at() { # ends the job when too many starts ended with this checkpoint as the newest
  # Counted in a variable too: a disk that is full or read-only takes no history.
  [ "$1" = "$ended_at" ] || ended_at=$1 ended_here=0
  ended_here=$((ended_here + 1))
  [ "$(ends_at "$1")" -gt "$restarts_without_progress" ] || [ "$ended_here" -gt "$restarts_without_progress" ] ||
    return 0
  note "stop gave up: $restarts_without_progress restarts ended before another checkpoint"
  exit 1
}
start() {
  note "start $starts $(newest_checkpoint)"
  "${command[@]}" &
  ranks=$!
}

# A signal is passed on to the ranks: they finish the step, save, and end with status 75.
asked="" ranks="" starts=0
pass_on() {
  signalled=1
  # Ranks that save already would end at once at a second signal.
  local before=$asked
  [ "$asked" = stop ] || asked=$1
  [ -n "$before" ] || [ -z "$ranks" ] || kill -s TERM "$ranks"
}
trap 'pass_on stop USR2' USR2 # megatron-ladder cancel
trap 'pass_on stop USR2' TERM # scancel, preemption

while true; do
  starts=$((starts + 1))
  start
  [ -z "$asked" ] || kill -s TERM "$ranks" # the signal came before the ranks were there
  # `wait` returns early at a signal. The ranks still run then, and it must wait again.
  signalled=1
  while [ -n "$signalled" ]; do
    signalled=""
    wait "$ranks"
    status=$?
  done
  ranks=""
  newest=$(newest_checkpoint)
  note "end $status $newest $asked"
  case $status in
  0 | 2) exit "$status" ;; # 0: finished; 2: a user's mistake
  esac
  [ "$asked" != stop ] || exit "$status"
  give_up_at "$newest"
  sleep 2 # the next start is in this job, from the newest checkpoint
done
