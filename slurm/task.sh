#!/usr/bin/env bash
# One task of a job step: torch's rendezvous out of Slurm's variables, a log of its own, then the command.
set -uo pipefail
{ # bash reads a script as it goes: without the braces one that is edited while it runs would go on somewhere else
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
read -r MASTER_ADDR MASTER_PORT <<<"$POLAR_RENDEZVOUS"
export MASTER_ADDR MASTER_PORT
tasks=${SLURM_STEP_TASKS_PER_NODE:-1} # 8(x16), or 8,4 where nodes differ
case $tasks in *,*) ;; *) export LOCAL_WORLD_SIZE=${tasks%%(*} ;; esac
if [ "$RANK" != 0 ]; then # the first rank writes into the job's log
  exec >>"$POLAR_LOG_DIR/rank-$RANK.log" 2>&1
fi
# Signals reach the ranks as well, which end by themselves. torchrun would die of SIGUSR1 and take its ranks along.
trap : USR1 TERM
if [ "$POLAR_LAUNCHER" = torchrun ]; then
  trap '' USR1
  # torchrun itself knows its host by the node's own names only, and not by POLAR_MASTER_SUFFIX.
  if [ "$RANK" = 0 ]; then export PET_RDZV_CONF=is_host=1; else export PET_RDZV_CONF=is_host=0; fi
fi
"$@"
status=$?
trap '' USR1 TERM
# srun says 143 whatever the first rank to fail has said.
[ "$status" = 0 ] || echo "${EPOCHREALTIME/,/.} $status ${SLURMD_NODENAME:-$(hostname)}" >"$POLAR_LOG_DIR/exit-$RANK"
exit "$status"
}
