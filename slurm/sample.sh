#!/usr/bin/env bash
# Trajectories of a pool of policies, drawn on many nodes: an array of parts, and a job that closes the output. From a
# shell, not by sbatch:
#   POLAR_PARTS=32 slurm/sample.sh --pool pool.yaml --prompts prompts.jsonl --output trajectories [options of sample]
# The output has the same bytes as one made by a single process. After a failure the same command does what is missing.
#SBATCH --job-name=polar-sample
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.log
source "${POLAR_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh"
polar_array sample "$@"
