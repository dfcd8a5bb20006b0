#!/usr/bin/env bash
# Starts train.py on all GPUs of this machine, or of all nodes of the Slurm job that it runs in:
#   scripts/launch.sh CONFIG_FILE [--table.key value …]
# Settings of the site (modules, paths, NCCL) come from the environment or from an untracked file cluster.env.
set -euo pipefail

config_file=${1:?usage: scripts/launch.sh CONFIG_FILE [--table.key value …]}
shift
if [ -f cluster.env ]; then
    set -a
    # shellcheck source=/dev/null
    . ./cluster.env
    set +a
fi
if [ -f "${VENV:-.venv}/bin/activate" ]; then
    # shellcheck source=/dev/null
    . "${VENV:-.venv}/bin/activate"
fi

# One thread a process: the work is on the GPU, and on a CPU the processes share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Compute nodes have no network; recordings come from the cache.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# Long sequences come close to the memory's limit: segments that can grow leave no gaps between them.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# One process a GPU (torchrun counts those that CUDA_VISIBLE_DEVICES leaves); two where there is none.
if [ -n "${NPROC_PER_NODE:-}" ]; then
    processes=$NPROC_PER_NODE
elif nvidia-smi --list-gpus >/dev/null 2>&1; then
    processes=gpu
else
    processes=2
fi

command=(torchrun --nproc_per_node "$processes")
if [ -n "${SLURM_JOB_ID:-}" ]; then
    head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Jobs that share a node must not share a port.
    port=$((20000 + SLURM_JOB_ID % 40000))
    command=(srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 "${command[@]}"
        --nnodes "$SLURM_NNODES" --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$head_node:$port")
else
    command+=(--standalone)
fi
exec "${command[@]}" train.py --job.config_file "$config_file" "$@"
