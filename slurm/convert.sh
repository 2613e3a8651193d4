#!/usr/bin/env bash
# Conversion to and from Hugging Face; needs no GPU.
#   sbatch slurm/convert.sh to-hf --checkpoint runs/pretrain_7b --output exports/polar-7b --layout internlm2
#SBATCH --job-name=polar-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --output=slurm/logs/%x-%j.log
source "${POLAR_HOME:-${SLURM_SUBMIT_DIR:?this is a job script: give it to sbatch or slurm/launch.sh}}/slurm/common.sh"
polar_one_task "$POLAR_PYTHON" -m megatron_polar convert "$@"
