#!/bin/bash
# Written by `megatron-ladder submit`; docs/guides/slurm.md says what each part is for.
# shellcheck disable=SC2016 # text in single quotes is data, not code
#SBATCH --job-name=ladder-ladder
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
#SBATCH --gres=gpu:4
#SBATCH --time=1-00:00:00
# A job that waits for a failed one ends: without this it would wait for ever.
#SBATCH --kill-on-invalid-dep=yes
# After a node's failure SLURM starts the job again; one log holds all its starts.
#SBATCH --requeue
#SBATCH --open-mode=append
# SLURM sends SIGUSR1 to this script (B:) 300 s before the time limit: time for a checkpoint.
#SBATCH --signal=B:USR1@300
# The job goes on when a node fails (spare nodes: 1).
#SBATCH --no-kill

cd -- /home/me || exit 2
set -u
export PYTHONUNBUFFERED=1 # lines reach the log at once
export OMP_NUM_THREADS=1 # a thread for each core of the rank, not of the node

command=(
  # The profile's A: not here, as all may read a command line.
  sh -c '. "$0" && exec "$@"' /shared/runs/ladder/slurm/1/environment
  python -P -m pretrain --preset paper-1b --data.paths /data --output-dir runs/ladder
)
srun=(
  srun --mpi=none --input=none # ranks meet through torch's store, not through MPI
  --cpus-per-task=1 # srun does not take it from #SBATCH
  --container-image='nvcr.io#nvidia/pytorch:25.09-py3' --container-workdir="$PWD"
  --container-mounts='/shared:/shared,/data sets:/data:ro'
)

run=/shared/runs/ladder
folder=/shared/runs/ladder/slurm/1
nodes=2
ranks_per_node=4
export NCCL_DEBUG=WARN # the log shows NCCL's version and its warnings
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
queue_again() {
  timeout 60 scontrol requeue "$SLURM_JOB_ID" || { note "stop SLURM did not queue it again: submit it again"; exit 75; }
  exit 0
}
end_steps() { # ends ranks that a killed srun has left behind
  local step
  for step in $(timeout 60 squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i); do
    [[ $step =~ \.[0-9]+$ ]] && timeout 60 scancel --signal=KILL "$step"
  done
}
ended_by_slurm() { # whether scancel, scontrol requeue or preemption ends the job
  local job
  job=$(timeout 60 scontrol --oneliner show job "$SLURM_JOB_ID") || return 1
  [[ $job != *JobState=RUNNING* || $job =~ PreemptTime=[0-9] ]]
}
answering() { # runs a step on the nodes that it is given, and prints the names of those on which it starts
  timeout --kill-after=10 60 srun --mpi=none --input=none --overlap --no-kill --nodes=$# --ntasks=$# \
    --ntasks-per-node=1 --nodelist="$(IFS=,; echo "$*")" printenv SLURMD_NODENAME
}
choose_hosts() {
  # Takes the first nodes that answer. SLURM refuses a step that names a node which it has taken from the job:
  # squeue has the others.
  local host left answered
  left=$(timeout 60 squeue --noheader --jobs="$SLURM_JOB_ID" --format=%N)
  mapfile -t left < <(scontrol show hostnames "${left:-$SLURM_JOB_NODELIST}")
  # One step for all nodes: SLURM's controller has one to make, and a dead node does not keep the others waiting.
  mapfile -t answered < <(answering "${left[@]}")
  if [ "${#answered[@]}" -lt "$nodes" ]; then
    # A node that hangs holds up those to which it passes the step on. Each gets a step, 16 at a time.
    export -f answering
    mapfile -t -O "${#answered[@]}" answered < <(
      printf '%s\n' "${left[@]}" | grep --fixed-strings --line-regexp --invert-match \
        --file=<(printf '%s\n' "${answered[@]}") |
        timeout --kill-after=10 60 xargs --max-procs=16 --replace=HOST bash -c 'answering HOST'
    )
  fi
  hosts=()
  for host in "${left[@]}"; do
    [ "${#hosts[@]}" -lt "$nodes" ] || return 0
    [[ " ${answered[*]} " != *" $host "* ]] || hosts+=("$host")
  done
  [ "${#hosts[@]}" = "$nodes" ]
}
# A task of a step is a rank. torch reads these variables. exec: srun's child is the rank itself.
as_rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'
# A rank that fails leaves its status here (pretrain/run/ends.py). The name is that of no earlier start.
ends() { echo "$folder/ends/${SLURM_RESTART_COUNT:-0}.$starts"; }
decided() { # prints a start's exit status: a rank's own, where one has left it, else that of srun, given as $1
  # srun has one status for all ranks: when one has failed it kills the others, and says 137. A rank that was
  # killed leaves none. The first look may come too early: another node has written the file.
  local place left look
  place=$(ends)
  for look in 1 2 3 4; do
    [ "$look" = 1 ] || sleep 1
    left=" $(cd "$place" 2>/dev/null && echo [0-9]*.json)"
    case $left in # 2 and 75 decide: others may have failed only because that rank had ended
    *" 2."*) echo 2 && return ;;
    *" 75."*) echo 75 && return ;;
    *" "[0-9]*) left=${left# } && echo "${left%%.*}" && return ;;
    esac
  done
  echo "$1"
}
# The port where ranks meet. It depends on job and start, as jobs may share a node. Linux's own begin at 32768.
port() { echo $((12000 + (SLURM_JOB_ID * 8 + starts) % 20000)); }
start() {
  if ! choose_hosts; then
    note "end 1 $(newest_checkpoint) fewer than $nodes nodes of the job are left"
    give_up_at "$(newest_checkpoint)"
    queue_again # SLURM gives it other nodes, or these when they are back
  fi
  MASTER_ADDR=${hosts[0]} MASTER_PORT=$(port)
  MEGATRON_LADDER_ENDS=$(ends)
  export MASTER_ADDR MASTER_PORT MEGATRON_LADDER_ENDS
  note "start $starts $(newest_checkpoint) on ${hosts[*]}"
  # block: ranks with neighbouring numbers share a node. cores: a rank stays on its own cores. --gpu-bind=none: a
  # rank sees all GPUs of its node, as NCCL reads their memory; LOCAL_RANK picks the rank's own. --wait: when one
  # rank has crashed, the others would wait for ever: they are killed after 30 s. --label: each line of the log
  # begins with its rank.
  # --overlap: for SLURM, a step that died with its node keeps its cores, and the next step would wait for them.
  "${srun[@]}" --nodes="$nodes" --ntasks=$((nodes * ranks_per_node)) --ntasks-per-node="$ranks_per_node" \
    --nodelist="$(IFS=,; echo "${hosts[*]}")" --distribution=block --cpu-bind=cores --gpu-bind=none \
    --kill-on-bad-exit=0 --wait=30 --label --overlap \
    bash -c "$as_rank" rank "${command[@]}" &
  ranks=$!
}

# A signal is passed on to the ranks: they finish the step, save, and end with status 75.
asked="" ranks="" starts=0
pass_on() {
  signalled=1
  # Ranks that save already would end at once at a second signal.
  local before=$asked
  [ "$asked" = stop ] || asked=$1
  # srun passes SIGUSR1 and SIGUSR2 on to the ranks; at SIGTERM it kills them at once.
  [ -n "$before" ] || [ -z "$ranks" ] || kill -s "$2" "$ranks"
}
trap 'pass_on limit USR1' USR1 # before the time limit
trap 'pass_on stop USR2' USR2 # megatron-ladder cancel
trap 'pass_on stop USR2' TERM # scancel, preemption

while true; do
  starts=$((starts + 1))
  start
  [ -z "$asked" ] || kill -s USR2 "$ranks" # the signal came before the ranks were there
  # `wait` returns early at a signal. The ranks still run then, and it must wait again.
  signalled=1
  while [ -n "$signalled" ]; do
    signalled=""
    wait "$ranks"
    status=$?
  done
  ranks=""
  [ "$status" = 0 ] || status=$(decided "$status")
  newest=$(newest_checkpoint)
  note "end $status $newest $asked"
  if [ "$status" != 0 ] && ended_by_slurm; then
    sleep 3600 & # SLURM ends the job; a preempted job that ended by itself would not be queued again
    wait $!
    exit "$status"
  fi
  case $status in
  0 | 2) exit "$status" ;; # 0: finished; 2: a user's mistake
  esac
  [ "$asked" != stop ] || exit "$status"
  give_up_at "$newest"
  [ "$asked" != limit ] || queue_again
  end_steps
  sleep 2 # the next start is in this job, from the newest checkpoint
done
