#!/usr/bin/env bash
# Stacks of a hanging job's ranks on this node: by py-spy where it is installed, else by the ranks themselves.
set -uo pipefail
PATH=$PATH:${POLAR_VENV:-}/bin
node=${SLURMD_NODENAME:-$(hostname)} count=0
for process in $(pgrep --uid "$(id -u)" --full 'megatron_polar train'); do
  case $(readlink "/proc/$process/exe") in *python*) ;; *) continue ;; esac
  tr '\0' '\n' <"/proc/$process/environ" 2>/dev/null | grep -qx "SLURM_JOB_ID=$SLURM_JOB_ID" || continue
  caught=$(awk '/^SigCgt:/ { print $2 }' "/proc/$process/status" 2>/dev/null)
  if command -v py-spy >/dev/null; then
    timeout 20 py-spy dump --pid "$process" >>"$POLAR_LOG_DIR/stacks-$node.txt" 2>&1 && count=$((count + 1))
  elif [ $((0x${caught:-0} >> 11 & 1)) = 1 ]; then # it has a handler for SIGUSR2: faulthandler's, which writes to its log
    kill -USR2 "$process" && count=$((count + 1))
  fi
done
echo "$node: asked $count processes for their stacks; they are in $POLAR_LOG_DIR"
