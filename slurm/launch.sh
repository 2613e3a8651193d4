#!/usr/bin/env bash
# Check a training job and submit it.
#   slurm/launch.sh [--dry-run] [--chain N] [options of sbatch] JOB.sh|CONFIG.yaml [section.key=value ...]
#
# --dry-run  checks and prints what would be submitted, and stops
# --chain N  N jobs, each of which goes on where the one before it stopped, in place of one that is requeued
#
# Checked before a GPU hour is spent: configuration, divisibility, memory by the estimate of `megatron-polar plan`,
# datasets and checkpoints that are named, and what Slurm itself says (sbatch --test-only).
POLAR_HOME=${POLAR_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
source "$POLAR_HOME/slurm/common.sh"

usage() { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

DRY_RUN='' CHAIN=0 NODES='' OPTIONS=()
while [ $# -gt 0 ]; do
  case $1 in
  --dry-run) DRY_RUN=1 ;;
  --chain)
    CHAIN=${2:-}
    shift
    ;;
  --chain=*) CHAIN=${1#*=} ;;
  -h | --help)
    usage
    exit 0
    ;;
  --nodes | -N)
    NODES=${2:-}
    shift
    ;;
  --nodes=*) NODES=${1#*=} ;;
  -N?*) NODES=${1#-N} ;;
  -*) OPTIONS+=("$1") ;;
  *) break ;;
  esac
  shift
done
[ $# -gt 0 ] || { usage >&2; exit 2; }
case $CHAIN in '' | *[!0-9]*) polar_die 2 "--chain $CHAIN is not a number of jobs" ;; esac

case $1 in
*.sh)
  JOB=$1 ARGUMENTS=("${@:2}")
  [ -f "$JOB" ] || polar_die 2 "$JOB: no such job script; there are $(cd slurm && echo pretrain_*.sh finetune_*.sh train.sh)"
  CONFIG=${POLAR_CONFIG:-$(sed -n 's/^polar_train .*POLAR_CONFIG:-\([^}]*\)}.*/\1/p' "$JOB")}
  OVERRIDES=("${ARGUMENTS[@]}")
  if [ -z "$CONFIG" ]; then # train.sh: the YAML comes first
    CONFIG=${2:-}
    OVERRIDES=("${@:3}")
  fi
  ;;
*)
  CONFIG=$1 OVERRIDES=("${@:2}")
  JOB=slurm/$(basename "$CONFIG" .yaml).sh
  if grep -q "POLAR_CONFIG:-$CONFIG}" "$JOB" 2>/dev/null; then
    ARGUMENTS=("${OVERRIDES[@]}")
  else
    JOB=slurm/train.sh ARGUMENTS=("$@")
  fi
  ;;
esac
[ -f "$CONFIG" ] || polar_die 2 "${CONFIG:-the YAML}: no such file; name a configuration such as examples/pretrain_7b.yaml"

minutes_of() { # a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S
  local days=0 rest=$1 first second third
  if [[ $rest == *-* ]]; then
    days=${rest%%-*} rest=${rest#*-}
    IFS=: read -r first second third <<<"$rest"
    echo $((10#$days * 1440 + 10#$first * 60 + 10#${second:-0}))
    return
  fi
  IFS=: read -r first second third <<<"$rest"
  if [ -n "${third:-}" ]; then echo $((10#$first * 60 + 10#$second)); else echo $((10#$first)); fi
}
option_of_job() { sed -n "s/^#SBATCH --$1=//p" "$JOB"; }
NODES=${NODES:-$(option_of_job nodes)}
OPTIONS=(--nodes="$NODES" "${OPTIONS[@]}")
GPUS=$(option_of_job gpus-per-node) RANKS=$(option_of_job ntasks-per-node) TIME='' EXCLUDED='' KEPT=()
for option in "${OPTIONS[@]}"; do
  case $option in
  --gpus-per-node=*) GPUS=${option##*[=:]} ;; # 8, or h100:8
  --ntasks-per-node=*) RANKS=${option#*=} ;;
  --time=*) TIME=${option#*=} ;;
  --exclude=*)
    EXCLUDED=${option#*=}
    continue
    ;;
  esac
  KEPT+=("$option")
done
OPTIONS=("${KEPT[@]}")
if [ "$POLAR_LAUNCHER" = torchrun ]; then RANKS=${POLAR_RANKS_PER_NODE:-8}; fi
[ "$RANKS" -le "$GPUS" ] || polar_die 2 "$RANKS ranks for $GPUS GPUs of a node; give --ntasks-per-node=$GPUS, too"
if [ -n "$TIME" ]; then # the scripts' signal, 15 minutes before the end, would come at once in a short job
  MINUTES=$(minutes_of "$TIME")
  if [ "$MINUTES" -lt 60 ]; then OPTIONS+=(--signal="B:USR1@$((MINUTES * 15 > 30 ? MINUTES * 15 : 30))"); fi
fi
mkdir -p slurm/logs

PYTHON=$POLAR_PYTHON # of a login node, which may have none of the container's
if [ "$POLAR_RUNTIME" != venv ] && [ -x "$POLAR_VENV/bin/python" ]; then PYTHON=$POLAR_VENV/bin/python; fi
"$PYTHON" -c 'import omegaconf, orjson' 2>/dev/null ||
  polar_die 2 "$PYTHON has no omegaconf and orjson, with which this node checks the job; pip install -r requirements.txt into $POLAR_VENV"
"$PYTHON" -m megatron_polar plan "$CONFIG" "${OVERRIDES[@]}" --nodes "$NODES" --gpus-per-node "$RANKS" \
  --gpu-memory-gb "${POLAR_GPU_MEMORY_GB:-80}" || exit $?
RUN=$("$PYTHON" -m megatron_polar.launch.job run-directory "$CONFIG" "${OVERRIDES[@]}") || exit $?
BAD=$(polar_bad_nodes "$RUN")
EXCLUDED=$EXCLUDED${BAD:+${EXCLUDED:+,}$BAD}
[ -z "$EXCLUDED" ] || OPTIONS+=(--exclude="$EXCLUDED")
if [ "$CHAIN" -gt 0 ]; then
  # Jobs of one name and user run one after the other.
  NAME=polar-$(basename "$RUN")-$(cksum <<<"$RUN" | cut -d' ' -f1)
  OPTIONS+=(--dependency=singleton --job-name="$NAME" --no-requeue)
  POLAR_CHAIN=$NAME.$(date +%s)
  export POLAR_CHAIN POLAR_REQUEUE=0
fi
export POLAR_HOME

TESTED=$(sbatch --test-only "${OPTIONS[@]}" "$JOB" "${ARGUMENTS[@]}" 2>&1) ||
  polar_die 2 "Slurm refuses it: ${TESTED//$'\n'/; }"
echo "$TESTED"
if [ -n "$DRY_RUN" ]; then
  printf 'dry run; would submit%s:' "$([ "$CHAIN" = 0 ] || echo " $CHAIN times")"
  printf ' %q' sbatch "${OPTIONS[@]}" "$JOB" "${ARGUMENTS[@]}"
  echo
  exit 0
fi
for _ in $(seq $((CHAIN > 0 ? CHAIN : 1))); do
  sbatch "${OPTIONS[@]}" "$JOB" "${ARGUMENTS[@]}" || exit $?
done
echo "log: slurm/logs/; run: $RUN; to stop with a checkpoint: touch $RUN/STOP"
