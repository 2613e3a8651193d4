#!/usr/bin/env bash
# Evaluation on one GPU; a model that needs more: sbatch --ntasks=4 --gpus-per-node=4 ... --tensor-model-parallel-size 4
#   sbatch slurm/evaluate.sh --checkpoint runs/pretrain_7b --suite preferences --data data/x.jsonl --output evaluations/x
#SBATCH --job-name=polar-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=128G
#SBATCH --time=04:00:00
#SBATCH --output=slurm/logs/%x-%j.log
source "${POLAR_HOME:-${SLURM_SUBMIT_DIR:?this is a job script: give it to sbatch or slurm/launch.sh}}/slurm/common.sh"
polar_evaluate "$@"
