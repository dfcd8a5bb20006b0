#!/usr/bin/env bash
# Trains on all GPUs of this machine, or of all nodes of the Slurm job that it runs in, and sees to it that the run goes
# on in the next job until it is finished:
#   scripts/launch.sh CONFIG_FILE [--table.key value …]
# Settings of the site (modules, paths, NCCL) come from the environment or from an untracked file cluster.env.
set -euo pipefail

config_file=${1:?usage: scripts/launch.sh CONFIG_FILE [--table.key value …]}
shift
if [ -f "${CLUSTER_ENV:-cluster.env}" ]; then
    set -a
    # shellcheck source=/dev/null
    . "${CLUSTER_ENV:-./cluster.env}"
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
# Compiled kernels on the node's own disk: hundreds of processes would lock each other out in a shared home folder.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/inductor-$(id -un)}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -un)}
# A crash outside of Python leaves its stack.
export PYTHONFAULTHANDLER=1
# After a signal torchrun waits that long, instead of 30 s, before it kills: a step and a save have to fit in.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}
# Tells this start of the run from all others, also where Slurm starts the same job again.
RUN_ID=${SLURM_JOB_ID:-$(hostname)-$$}.${SLURM_RESTART_COUNT:-0}.$(date +%s)
export RUN_ID

# When the job ends, in seconds since 1970; not all versions of Slurm say so by themselves.
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    end=$(squeue -h -j "$SLURM_JOB_ID" -o %e 2>/dev/null || true)
    if end=$(date -d "$end" +%s 2>/dev/null) && [ "$end" -gt "$(date +%s)" ]; then
        export SLURM_JOB_END_TIME=$end
    fi
fi

# Prints outcome, newest checkpointed step and dump folder of the run.
state() { python -m torchtitan.outcome --job.config_file "$config_file" "$@"; }
# Ends the chain of jobs: the rest of an array does not go on.
end_chain() {
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" || true
    fi
}

line=$(state "$@")
read -r _ step_before _ <<<"$line"

# One process a GPU (torchrun counts those that CUDA_VISIBLE_DEVICES leaves); two where there is none.
if [ -n "${NPROC_PER_NODE:-}" ]; then
    processes=$NPROC_PER_NODE
elif nvidia-smi --list-gpus >/dev/null 2>&1; then
    processes=gpu
else
    processes=2
fi

# SIGUSR1, Slurm's warning, ends torchrun and leaves its workers behind unless it is told to pass it on.
command=(torchrun --nproc_per_node "$processes" "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
if [ "${SLURM_NNODES:-1}" -gt 1 ]; then
    # This script runs on the first node. A port that is free there, for jobs may share a node.
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    command+=(--nnodes "$SLURM_NNODES" --rdzv_backend c10d --rdzv_id "$RUN_ID" --rdzv_endpoint "$head_node:$port")
else
    command+=(--standalone)
fi
command+=(train.py --job.config_file "$config_file" "$@")
if [ -n "${SLURM_JOB_ID:-}" ]; then
    # Unbound: one task a node would else be confined to one core, with all of its processes.
    command=(srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none "${command[@]}")
fi

"${command[@]}" &
child=$!
for signal in TERM USR1 INT HUP; do
    # shellcheck disable=SC2064 # the values of now
    trap "kill -s $signal $child 2>/dev/null || true" "$signal"
done
status=0
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not the child
    status=0
    wait "$child" || status=$?
done

line=$(state "$@")
read -r outcome step dump_folder <<<"$line"
echo "launch.sh: $outcome at step $step of $dump_folder (exit status $status)"
if [ "$outcome" = finished ]; then
    end_chain
    exit 0
elif [ -z "${SLURM_JOB_ID:-}" ]; then
    if [ "$outcome" = go_on ]; then status=0; fi
    exit "$status"
elif [ "$step" -eq "$step_before" ]; then
    # A run that cannot get from one checkpoint to the next would be started again for ever. One that went back to an
    # older step (load_step, fall_back) may have gained some and be at a smaller one; newer ones are then set aside.
    echo "launch.sh: no step was gained since step $step_before; the run is not started again" >&2
    end_chain
    exit 1
elif [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    echo "launch.sh: the next job of the array goes on"
    if [ "$outcome" = go_on ]; then exit 0; fi
    exit 1
fi
echo "launch.sh: job $SLURM_JOB_ID is put back into the queue"
scontrol requeue "$SLURM_JOB_ID"
