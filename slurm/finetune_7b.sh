#!/usr/bin/env bash
# Fine-tuning of POLAR-7B on human preferences: 16 H100.
#   slurm/launch.sh --dry-run slurm/finetune_7b.sh              check everything, submit nothing
#   sbatch slurm/finetune_7b.sh [section.key=value ...]         from the top of the repository
#SBATCH --job-name=polar-finetune-7b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
source "${POLAR_HOME:-${SLURM_SUBMIT_DIR:?this is a job script: give it to sbatch or slurm/launch.sh}}/slurm/common.sh"
polar_train "${POLAR_CONFIG:-examples/finetune_7b.yaml}" "$@"
