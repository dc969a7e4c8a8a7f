#!/bin/bash
# Train a run directory on several machines with SLURM:
#   scllm pretrain blood.h5ad --run-dir runs/blood --write-only
#   sbatch slurm.sh runs/blood
# The job saves a checkpoint before its time limit, is queued again, and resumes, until the run is finished.
#SBATCH --job-name=scllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
run_dir=${1:?"Expected the run directory. Run: sbatch slurm.sh RUN_DIR"}

# the first machine of the job is where all of them meet; a job that was queued again meets under a new name
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
meeting="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"

srun --kill-on-bad-exit=1 \
    torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$first:29500" --rdzv-id="$meeting" \
    -m scllm run "$run_dir" &
training=$!

save_and_queue_again() {
    # torchrun passes SIGTERM on: each process finishes its step, and the first one saves a checkpoint
    kill -TERM "$training"
    wait "$training" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
# SLURM sends SIGUSR1 to this script 300 seconds before the time limit, as asked for above
trap save_and_queue_again USR1

wait "$training"
