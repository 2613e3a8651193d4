#!/usr/bin/env bash
# JSONL to an indexed dataset on many nodes: an array of parts, and a job that joins them. From a shell, not by sbatch:
#   POLAR_PARTS=32 slurm/preprocess.sh INPUT... --output data/pretrain --tokenizer tokenizer/ [options of preprocess]
# The dataset has the same bytes as one made by a single process. After a failure the same command does what is missing.
#SBATCH --job-name=polar-preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.log
source "${POLAR_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh"
polar_array preprocess "$@"
