#!/bin/bash
# Written by `megatron-ladder submit`; docs/guides/slurm.md says what each part is for.
# shellcheck disable=SC2016 # what stands in single quotes is data
#SBATCH --job-name=ladder-ladder
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --gres=gpu:1
# A job that waits for one that failed ends, rather than waiting for ever.
#SBATCH --kill-on-invalid-dep=yes
# After a node's failure SLURM starts the job again; one log holds all its starts.
#SBATCH --requeue
#SBATCH --open-mode=append

cd -- /home/me || exit 2
set -u
export PYTHONUNBUFFERED=1 # the log shows a line when it is written
export OMP_NUM_THREADS=1 # as many threads as the rank has cores, not all of the node's

command=(
  apptainer exec --nv --pwd "$PWD"
  --bind /shared:/shared
  /shared/pytorch.sif
  env
  A=1
  python -m pretrain.cli eval runs/ladder --data /data
)
srun=(
  srun --mpi=none --input=none # ranks find each other by torch's store
  --cpus-per-task=1 # srun does not take it from #SBATCH
)

exec "${srun[@]}" --nodes=1 --ntasks=1 "${command[@]}"
