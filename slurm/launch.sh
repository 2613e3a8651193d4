#!/usr/bin/env bash
# Check a training job and submit it; slurm/launch.sh --help says how.
# The checks are megatron_polar/launch/submit.py; here is what the site file says of the environment they run in.
POLAR_HOME=${POLAR_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
source "$POLAR_HOME/slurm/common.sh"

[ -e "$POLAR_SITE" ] || echo "note: there is no $POLAR_SITE, so account and partition are sbatch's defaults"
case $POLAR_RUNTIME:$POLAR_CONTAINER_IMAGE in
venv:*) ;;
*:/*) [ -e "$POLAR_CONTAINER_IMAGE" ] || echo "note: $POLAR_CONTAINER_IMAGE is not on this node" ;;
esac
PYTHON=$(polar_login_python) || exit $?
export POLAR_HOME
"$PYTHON" -m megatron_polar.launch.submit --launcher "$POLAR_LAUNCHER" --runtime "$POLAR_RUNTIME" \
  ${POLAR_RANKS_PER_NODE:+--ranks-per-node "$POLAR_RANKS_PER_NODE"} --gpu-memory-gb "$POLAR_GPU_MEMORY_GB" \
  --cpu-partition "$POLAR_CPU_PARTITION" -- "$@"
