#!/bin/bash
# Train on several machines: sbatch --nodes 2 docs/slurm.sh --recipe gpt2_124m [flags of train.py]
# One task a node; each is a torchrun agent that starts a process for each GPU of its node. Give your cluster's own
# --partition, --account and --time to sbatch, and set up your environment below. A job that is started again continues
# from its newest checkpoint.
#SBATCH --job-name=modalities
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source .venv/bin/activate

# The agents meet at the first node of the job; the port is the job's own, for two jobs may share a node.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
rendezvous="$head_node:$((20000 + SLURM_JOB_ID % 10000))"

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend c10d --rdzv_endpoint "$rendezvous" --rdzv_id "$SLURM_JOB_ID" \
    train.py "$@"
