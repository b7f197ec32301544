#!/bin/sh
# Train on one or more nodes of a SLURM cluster, and come back in the queue until it is done:
#   sbatch --nodes 2 tools/slurm/train.sh --config-file configs/pfpn_pgn.yaml OUTPUT_DIR output/run1
# Run from the project's folder, with its environment active. docs/cluster.md.
#SBATCH --job-name=gn_practical
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=48
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt

trap 'exit 143' TERM # cancelled: do not come back

MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 40000))

# One launcher a node; it starts the ranks, passes signals on to them, and keeps their exit code.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 sh -c 'exec python tools/train_net.py --resume \
    --num-gpus "${SLURM_GPUS_ON_NODE:-8}" --num-machines "$SLURM_NNODES" \
    --machine-rank "$SLURM_NODEID" --dist-url "tcp://$MASTER:$MASTER_PORT" "$@"' train_net "$@"
code=$?

if [ "$code" -eq 75 ]; then # stopped by a signal, with a checkpoint
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
