#!/bin/bash
# Written by `megatron-ladder submit`; docs/guides/slurm.md says what each part is for.
# shellcheck disable=SC2016 # text in single quotes is data, not code
#SBATCH --job-name=ladder-ladder
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --gres=gpu:1
# A job that waits for a failed one ends: without this it would wait for ever.
#SBATCH --kill-on-invalid-dep=yes
# After a node's failure SLURM starts the job again; one log holds all its starts.
#SBATCH --requeue
#SBATCH --open-mode=append

cd -- /home/me || exit 2
set -u
export PYTHONUNBUFFERED=1 # lines reach the log at once
export OMP_NUM_THREADS=1 # a thread for each core of the rank, not of the node

command=(
  apptainer exec --nv --pwd "$PWD"
  --bind /shared:/shared
  /shared/pytorch.sif
  # The profile's A: not here, as all may read a command line.
  sh -c '. "$0" && exec "$@"' /runs/ladder-slurm/1/environment
  python -P -m pretrain.cli eval runs/ladder --data /data
)
srun=(
  srun --mpi=none --input=none # ranks meet through torch's store, not through MPI
  --cpus-per-task=1 # srun does not take it from #SBATCH
)

exec "${srun[@]}" --nodes=1 --ntasks=1 "${command[@]}"
