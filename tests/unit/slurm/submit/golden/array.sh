#!/bin/bash
# Written by `megatron-ladder submit`; docs/guides/slurm.md says what each part is for.
# shellcheck disable=SC2016 # text in single quotes is data, not code
#SBATCH --job-name=ladder-tokens
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --partition=gpu
#SBATCH --account=my-project
#SBATCH --qos=normal
#SBATCH --constraint='h100&ib'
#SBATCH --mem=0
#SBATCH --time=1:00:00
# A job that waits for a failed one ends: without this it would wait for ever.
#SBATCH --kill-on-invalid-dep=yes
# After a node's failure SLURM starts the job again; one log holds all its starts.
#SBATCH --requeue
#SBATCH --open-mode=append

cd -- /home/me || exit 2
# `module` is a function. The shell that submitted had it, or /etc/profile defines it.
# shellcheck source=/dev/null
[ -n "$(type -t module)" ] || . /etc/profile
module load cuda/13.0 || exit 2
set -u
export PYTHONUNBUFFERED=1 # lines reach the log at once
export OMP_NUM_THREADS=12 # a thread for each core of the rank, not of the node

command=(
  # The profile's HF_HOME: not here, as all may read a command line.
  sh -c '. "$0" && exec "$@"' /tokens-slurm/1/environment
  /shared/venv/bin/python -P -m pretrain.cli data tokenize /text --tokenizer t.model --output-dir /tokens
)
srun=(
  srun --mpi=none --input=none # ranks meet through torch's store, not through MPI
  --cpus-per-task=12 # srun does not take it from #SBATCH
)

# Each task of a job array does its share of the parts.
command+=(--rank $((4 + SLURM_ARRAY_TASK_ID)) --world-size 10)
exec "${srun[@]}" --nodes=1 --ntasks=1 "${command[@]}"
