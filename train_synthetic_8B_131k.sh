#!/usr/bin/env bash
# sbatch train_synthetic_8B_131k.sh [--table.key value …]
# Another configuration: CONFIG_FILE=my.toml sbatch --nodes=2 train_synthetic_8B_131k.sh
# It goes on in later jobs until it is finished: each requeues itself. As an array: sbatch --array=1-20%1 train_synthetic_8B_131k.sh
# On one machine without Slurm: ./train_synthetic_8B_131k.sh
#SBATCH --job-name=synthetic-8B-131k
#SBATCH --nodes=12
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=06:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300

# sbatch runs a copy of this file from a folder of its own; what it belongs to is then where it was submitted.
[ -f "$(dirname "$0")/scripts/launch.sh" ] && cd "$(dirname "$0")" || cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
exec scripts/launch.sh "${CONFIG_FILE:-train_configs/synthetic_8b_131k.toml}" "$@"
