#!/usr/bin/env bash
# Training of any YAML on one node; more with --nodes.
#   slurm/launch.sh --dry-run my.yaml                      check everything, submit nothing
#   sbatch --nodes=2 slurm/train.sh my.yaml [section.key=value ...]
#SBATCH --job-name=polar-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
source "${POLAR_HOME:-${SLURM_SUBMIT_DIR:?this is a job script: give it to sbatch or slurm/launch.sh}}/slurm/common.sh"
polar_train "$@"
