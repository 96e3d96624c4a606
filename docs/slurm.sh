#!/bin/bash
# Train on several machines: sbatch --nodes 2 docs/slurm.sh --recipe gpt2_124m [flags of train.py]
# One task a node; each keeps torchrun's agent alive, which starts a process for each GPU of its node. Give your
# cluster's own --partition, --account and --time to sbatch, and set up your environment below. Before its time is up
# the job saves its state and queues itself anew; a job that is started again continues from its newest checkpoint.
#SBATCH --job-name=modalities
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source .venv/bin/activate

# The agents meet at the first node of the job; the port is the job's own, for two jobs may share a node.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
rendezvous="${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))"

# One task that ends for good ends the others, who would wait for it; but they may save first.
srun --kill-on-bad-exit=0 --wait=120 python -m modalities.run \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-endpoint "$rendezvous" --rdzv-id "$SLURM_JOB_ID" \
    train.py "$@" &
step=$!

time_is_up=no
trap 'time_is_up=yes; kill -USR1 "$step"' USR1
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # the trap ended the waiting, not the step
    status=0
    wait "$step" || status=$?
done
# 75: stopped, and saved. Not after scancel, which sends SIGTERM to the step alone.
if [ "$status" = 75 ] && [ "$time_is_up" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
