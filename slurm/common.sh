# What all jobs share; sourced by the job scripts, never run.
# shellcheck shell=bash
#
# A job script names a YAML and calls polar_train. Everything that a site or a user may want to change is a variable
# with a default below; slurm/site.env sets a site's, the environment goes before both. docs/slurm.md is the guide.
set -uo pipefail

polar_say() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }
polar_die() { # status message...
  local status=$1
  shift
  polar_say "error: $*" >&2
  exit "$status"
}

# --- Settings --------------------------------------------------------------------------------------------------------

POLAR_HOME=${POLAR_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -d "$POLAR_HOME/megatron_polar" ] ||
  polar_die 2 "$POLAR_HOME is not the repository; submit from its top, or set POLAR_HOME"
cd "$POLAR_HOME" || exit 2
POLAR_SITE=${POLAR_SITE:-$POLAR_HOME/slurm/site.env}
[ -e "$POLAR_SITE" ] || [ "$POLAR_SITE" = "$POLAR_HOME/slurm/site.env" ] || polar_die 2 "POLAR_SITE=$POLAR_SITE: no such file"
# shellcheck source=/dev/null
if [ -r "$POLAR_SITE" ]; then
  set +u
  source "$POLAR_SITE"
  set -u
fi
: "${POLAR_RUNTIME:=venv}"               # venv, pyxis or apptainer
: "${POLAR_VENV:=$POLAR_HOME/.venv}"     # venv: its directory
: "${POLAR_MODULES:=}"                   # venv: environment modules to load first
: "${POLAR_CONTAINER_IMAGE:=}"           # pyxis, apptainer: image file or name
: "${POLAR_CONTAINER_MOUNTS:=}"          # pyxis, apptainer: more mounts, source:target,...; the repository is mounted anyway
: "${POLAR_LAUNCHER:=srun}"              # srun: one task per GPU; torchrun: one task per node, which starts the ranks
: "${POLAR_RANKS_PER_NODE:=}"             # torchrun: ranks of a node; default: its GPUs
: "${POLAR_GPU_MEMORY_GB:=80}"           # of one GPU, in GB (10^9 bytes), for launch.sh's estimate
: "${POLAR_CPU_PARTITION:=}"             # for jobs without GPUs (preprocess, sample, convert), where that is another one
: "${POLAR_SRUN_OPTIONS:=}"              # more options of srun, such as --mpi=none or --network=...
: "${POLAR_MASTER_SUFFIX:=}"            # behind the first node's name, where that leads over a slow network: -ib0
: "${POLAR_PREFLIGHT:=full}"             # full, nodes (without the all-reduce) or off
: "${POLAR_PREFLIGHT_SECONDS:=300}"      # how long a node may take for each part of it; all of it twice as long
: "${POLAR_MIN_BANDWIDTH_GB_S:=0}"       # all-reduce bandwidth below which no training starts
: "${POLAR_MIN_FREE_GB:=50}"             # disk space below which no training starts
: "${POLAR_MAX_RESTARTS:=100}"           # requeues of one job
: "${POLAR_REQUEUE:=1}"                  # 0: end with status 75 and leave going on to the next job of a chain
: "${POLAR_HANG_SECONDS:=1200}"          # without a heartbeat for so long the job is ended and requeued; 0: never
: "${POLAR_WATCH_SECONDS:=15}"           # between looks at heartbeat and STOP file

# Defaults that every run on H100 nodes wants; NCCL reads its own variables from the environment or site.env.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # overlap of communication needs the order of one queue
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
export PYTHONPATH=$POLAR_HOME${PYTHONPATH:+:$PYTHONPATH}
# srun of 22.05 and newer forgets what sbatch was told.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# Statuses of megatron_polar/errors.py that the scripts use themselves.
readonly DONE=0 USER_ERROR=2 BAD_STEPS=17 CANNOT_SAVE=73 STOPPED=75 INTERRUPTED=130 FENCED=77 NO_PROGRESS=78 PREFLIGHT_FAILED=79

# --- Starting programs -----------------------------------------------------------------------------------------------

case $POLAR_RUNTIME in
venv)
  # shellcheck disable=SC2086
  if [ -n "$POLAR_MODULES" ]; then module load $POLAR_MODULES || polar_die 2 "module load $POLAR_MODULES failed; mend POLAR_MODULES"; fi
  POLAR_PYTHON=${POLAR_PYTHON:-$POLAR_VENV/bin/python}
  [ -x "$POLAR_PYTHON" ] || polar_die 2 "$POLAR_PYTHON is no Python; make a venv (make .venv/.ready), or set POLAR_VENV in $POLAR_SITE"
  ;;
pyxis | apptainer)
  POLAR_PYTHON=${POLAR_PYTHON:-python3}
  [ -n "$POLAR_CONTAINER_IMAGE" ] || polar_die 2 "POLAR_RUNTIME=$POLAR_RUNTIME needs POLAR_CONTAINER_IMAGE; set it in $POLAR_SITE"
  ;;
*) polar_die 2 "POLAR_RUNTIME=$POLAR_RUNTIME is unknown; use venv, pyxis or apptainer" ;;
esac
case $POLAR_LAUNCHER in srun | torchrun) ;; *) polar_die 2 "POLAR_LAUNCHER=$POLAR_LAUNCHER is unknown; use srun or torchrun" ;; esac
case $POLAR_PREFLIGHT in full | nodes | off) ;; *) polar_die 2 "POLAR_PREFLIGHT=$POLAR_PREFLIGHT is unknown; use full, nodes or off" ;; esac

polar_srun() { # srun options... -- command...
  # A site's SBATCH_EXPORT=NONE is for what a user's shell has, and not for what this script sets.
  local options=(--export=ALL --kill-on-bad-exit=1 --wait=60) command=()
  local mounts="$POLAR_HOME:$POLAR_HOME${POLAR_CONTAINER_MOUNTS:+,$POLAR_CONTAINER_MOUNTS}"
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  if [ "$POLAR_RUNTIME" = pyxis ]; then
    options+=(--container-image="$POLAR_CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$POLAR_HOME")
    # An image's own values would go before ours otherwise.
    options+=(--no-container-mount-home --container-env="$(compgen -e | grep -E '^(NCCL|TORCH|UCX|FI|OMP|CUDA_DEVICE|POLAR|PYTHON|HF)' | paste -sd,)")
  elif [ "$POLAR_RUNTIME" = apptainer ]; then
    command=(apptainer exec --nv --bind "$mounts" --pwd "$POLAR_HOME" "$POLAR_CONTAINER_IMAGE")
  fi
  # shellcheck disable=SC2086
  srun "${options[@]}" $POLAR_SRUN_OPTIONS "${command[@]}" "$@"
}

polar_login_python() { # prints a Python of this node that can check a job: a container's may not be here
  local python=$POLAR_PYTHON
  if [ "$POLAR_RUNTIME" != venv ] && [ -x "$POLAR_VENV/bin/python" ]; then python=$POLAR_VENV/bin/python; fi
  "$python" -c 'import omegaconf, orjson' 2>/dev/null ||
    polar_die 2 "$python has no omegaconf and orjson, with which this node checks the job; make .venv/.ready, or pip install -r requirements.txt into $POLAR_VENV"
  echo "$python"
}

polar_python() { # on the first node, for what takes a moment
  if [ "$POLAR_RUNTIME" = venv ]; then
    "$POLAR_PYTHON" "$@"
  else
    polar_srun --nodes=1 --ntasks=1 --overlap -- "$POLAR_PYTHON" "$@"
  fi
}

polar_ranks() { # stage command...: the command once for each rank, with torch's rendezvous in its environment
  local stage=$1 options=()
  shift
  if [ "$stage" = 0 ]; then options=(--kill-on-bad-exit=0 --wait=0); fi # every node is to say how it is
  # Different for every job on a node, every restart, and preflight (0) and training (1); below the ephemeral ports.
  export MASTER_PORT=$((10000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0} % 4 * 2 + stage) % 22000))
  # Containers may bring a MASTER_ADDR of their own: task.sh goes by this one.
  export POLAR_RENDEZVOUS="$MASTER_ADDR $MASTER_PORT" POLAR_LAUNCHER
  if [ "$POLAR_LAUNCHER" = torchrun ]; then
    options+=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE")
    polar_srun "${options[@]}" -- slurm/task.sh "$POLAR_PYTHON" \
      -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${POLAR_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}" \
      --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$stage" \
      --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --no-python "$@"
  else
    polar_srun "${options[@]}" -- slurm/task.sh "$@"
  fi
}

# --- A training job --------------------------------------------------------------------------------------------------

polar_train() { # CONFIG.yaml [section.key=value ...]
  ASKED=''
  trap 'ASKED=USR1' USR1 # before there are ranks; bash looks at it when the program in front has ended
  trap 'ASKED=TERM' TERM
  polar_open_run "$@"
  polar_check_nodes "$@"
  polar_claim_run
  polar_run_ranks "$@"
  polar_decide
}

polar_open_run() { # find the run directory, heed its marks, say what runs where
  local config=$1
  RUN=$(polar_python -m megatron_polar.launch.job run-directory "$@") || polar_elsewhere $? "to read the configuration"
  mkdir -p "$RUN" || polar_elsewhere $? "to make $RUN"
  polar_say "job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: $config in $RUN"
  if [ -e "$RUN/DONE" ]; then
    polar_say "$RUN/DONE is there: nothing to do; remove it to train on"
    exit "$DONE"
  fi
  if [ -e "$RUN/STOP" ]; then
    polar_say "$RUN/STOP is there: not starting; remove it to train on"
    polar_cancel_chain
    exit "$DONE"
  fi
  STARTED=$(date +%s)
  export POLAR_LOG_DIR=$RUN/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  mkdir -p "$POLAR_LOG_DIR" || exit 1
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)$POLAR_MASTER_SUFFIX
  export MASTER_ADDR
  env | grep -E '^(POLAR|SLURM|NCCL|TORCH|CUDA|MASTER|UCX|FI)_' | grep -v -E 'TOKEN|KEY|SECRET' | sort >"$POLAR_LOG_DIR/environment.txt"
}

polar_check_nodes() { # preflight; nodes that fail are excluded from the next try
  [ "$POLAR_PREFLIGHT" != off ] || return 0
  local options=(--output "$POLAR_LOG_DIR/preflight" --timeout-seconds "$POLAR_PREFLIGHT_SECONDS")
  options+=(--min-free-gb "$POLAR_MIN_FREE_GB" --min-bandwidth-gb-s "$POLAR_MIN_BANDWIDTH_GB_S")
  [ "$POLAR_PREFLIGHT" != nodes ] || options+=(--no-all-reduce)
  polar_ranks 0 "$POLAR_PYTHON" -m megatron_polar preflight "$@" "${options[@]}" &
  local step=$! limit=$((2 * POLAR_PREFLIGHT_SECONDS)) # each wait of a rank is limited already, unless it is stopped
  { trap - USR1 TERM; sleep "$limit" || exit; polar_say "preflight: not over after $limit s, ending it"; polar_kill_steps; } &
  local killer=$!
  polar_wait "$step"
  pkill --parent "$killer"
  kill "$killer" 2>/dev/null
  polar_python -m megatron_polar preflight "$@" "${options[@]}" --judge --nodes "$SLURM_JOB_NODELIST"
  local status=$?
  if [ "$status" = "$PREFLIGHT_FAILED" ]; then
    cat "$POLAR_LOG_DIR/preflight/bad_nodes" >>"$RUN/bad_nodes"
    polar_go_on "nodes failed the preflight: $(paste -sd, "$POLAR_LOG_DIR/preflight/bad_nodes")"
  elif [ "$status" != 0 ]; then
    polar_cancel_chain
    exit "$status"
  fi
}

polar_claim_run() { # a job that Slurm knows to be over may live on, on a node that is cut off: take over from it
  local holder job found
  holder=$(head -n 1 "$RUN/lock" 2>/dev/null) || return 0
  job=$(awk '{print $3}' <<<"$holder")
  case $job in '' | -) return 0 ;; esac
  if [ "$job" != "$SLURM_JOB_ID" ]; then # only what Slurm says for sure
    found=$(squeue --noheader --jobs "$job" --states RUNNING,COMPLETING,SUSPENDED 2>&1) || [[ $found == *"Invalid job id"* ]] || return 0
    case $found in '' | *"Invalid job id"*) ;; *) return 0 ;; esac
  fi
  export POLAR_TAKE_OVER=$holder
}

polar_run_ranks() {
  local step watcher
  [ -z "$ASKED" ] || polar_go_on "asked to end by SIG$ASKED before the ranks were started"
  rm -f "$POLAR_LOG_DIR"/exit-* # of the preflight
  polar_python -m megatron_polar.launch.job begin "$RUN" || polar_elsewhere $? "to write into $RUN"
  rm -f "slurm/logs/first-node-$SLURM_JOB_ID"
  polar_ranks 1 "$POLAR_PYTHON" -m megatron_polar train "$@" &
  step=$!
  trap 'ASKED=USR1; polar_say "time is nearly up: asking for a checkpoint"; polar_ask' USR1
  trap 'ASKED=TERM; polar_say "asked to end"; polar_is_current && scancel --signal=TERM "$SLURM_JOB_ID"' TERM
  polar_watch &
  watcher=$!
  [ "$ASKED" != USR1 ] || polar_ask
  polar_wait "$step"
  kill "$watcher" 2>/dev/null
  wait "$watcher" 2>/dev/null
  trap '' TERM USR1
}

polar_wait() { # process: for its end; a trap ends `wait`, the ranks go on
  while :; do
    wait "$1"
    kill -0 "$1" 2>/dev/null || break
  done
}

polar_is_current() { # Slurm may have requeued the job because it lost this node: then its steps are those of another script
  local restarts
  restarts=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null | grep -o ' Restarts=[0-9]*' | cut -d= -f2)
  [ "${restarts:-0}" -le "${SLURM_RESTART_COUNT:-0}" ]
}

polar_kill_steps() { # and not the job: this script is to decide
  local step
  polar_is_current || return 0
  for step in $(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i | grep -E '\.[0-9]+$'); do
    scancel --signal=KILL "$step"
  done
}

polar_ask() { # for a checkpoint and an end; polar_watch repeats it, as the first signal may come before there are ranks
  touch "$POLAR_LOG_DIR/asked"
  if polar_is_current; then scancel --signal=USR1 "$SLURM_JOB_ID"; fi
}

polar_watch() { # STOP file and heartbeat, as long as the ranks run
  local beat age
  trap - USR1 TERM
  while sleep "$POLAR_WATCH_SECONDS"; do
    if [ -e "$POLAR_LOG_DIR/asked" ]; then
      polar_ask
    elif [ -e "$RUN/STOP" ]; then
      polar_say "$RUN/STOP is there: asking for a checkpoint"
      polar_ask
    fi
    [ "$POLAR_HANG_SECONDS" -gt 0 ] || continue
    beat=$(stat -c %Y "$RUN/heartbeat" 2>/dev/null || echo 0)
    age=$(($(date +%s) - (beat > STARTED ? beat : STARTED)))
    # Before the first heartbeat of this job containers are fetched and libraries loaded: that may take three times as long.
    if [ "$age" -gt $((beat > STARTED ? POLAR_HANG_SECONDS : 3 * POLAR_HANG_SECONDS)) ]; then
      polar_say "no heartbeat for $age s ($(cat "$RUN/heartbeat" 2>/dev/null)): taking stacks and ending the ranks"
      timeout 120 srun --overlap --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" slurm/stacks.sh
      polar_kill_steps
      return
    fi
  done
}

polar_decide() { # what happened, and what now
  local status reason
  reason=$(polar_python -m megatron_polar.launch.job after "$RUN" --since "$STARTED" --logs "$POLAR_LOG_DIR" \
    --asked "$ASKED" --restart "${SLURM_RESTART_COUNT:-0}" --max-restarts "$POLAR_MAX_RESTARTS")
  status=$?
  case $status in
  "$DONE")
    date >"$RUN/DONE"
    polar_say "done: $reason"
    exit "$DONE"
    ;;
  "$STOPPED") polar_go_on "$reason" ;;
  "$FENCED")
    polar_say "$reason"
    exit "$FENCED"
    ;;
  "$USER_ERROR" | "$BAD_STEPS" | "$CANNOT_SAVE" | "$NO_PROGRESS" | "$INTERRUPTED")
    polar_say "not going on (status $status): $reason"
    polar_say "logs of the other ranks: $POLAR_LOG_DIR; journal: $RUN/events.jsonl"
    polar_cancel_chain
    exit "$status"
    ;;
  *) polar_go_on "nothing could be decided (status $status)" ;; # the first node may be what has failed
  esac
}

polar_elsewhere() { # status, what for: what the first node cannot do another may; where two in a row cannot, none can
  local mark=slurm/logs/first-node-$SLURM_JOB_ID
  if [ "$1" = "$USER_ERROR" ]; then exit "$1"; fi
  if rm "$mark" 2>/dev/null; then polar_die "$1" "status $1 $2, as on another first node before"; fi
  touch "$mark"
  SICK=${SLURMD_NODENAME:-}
  polar_go_on "status $1 $2 on the first node: trying without it"
}

polar_go_on() { # reason: requeue this job, without the nodes that are known to be bad
  local job
  polar_say "$1"
  if ! polar_is_current; then
    polar_say "Slurm has requeued this job already: it goes on elsewhere, and this script ends"
    exit "$FENCED"
  fi
  if [ -n "$RUN" ] && [ -e "$RUN/STOP" ]; then
    polar_say "$RUN/STOP is there: not going on; remove it and submit again to do so"
    polar_cancel_chain
    exit "$DONE"
  fi
  if [ -n "${POLAR_CHAIN:-}" ]; then
    for job in $(squeue --noheader --name="$SLURM_JOB_NAME" --user="$(id -un)" --states=PENDING --format=%A); do
      polar_exclude "$job"
    done
  fi
  if [ "$POLAR_REQUEUE" != 1 ] || [ "$ASKED" = TERM ]; then
    exit "$STOPPED"
  fi
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$POLAR_MAX_RESTARTS" ]; then
    polar_die "$NO_PROGRESS" "restarted ${SLURM_RESTART_COUNT:-0} times already, as often as POLAR_MAX_RESTARTS allows; submit again to go on"
  fi
  trap '' TERM # requeueing ends this script
  scontrol requeue "$SLURM_JOB_ID" || polar_die "$STOPPED" "this job cannot be requeued; submit again to go on"
  polar_say "requeued"
  polar_exclude "$SLURM_JOB_ID"
  exit "$STOPPED"
}

polar_bad_nodes() { # run directory: nodes that have failed the preflight and that Slurm knows
  { cat "$1/bad_nodes" 2>/dev/null; echo "${SICK:-}"; } | sort -u | grep -Fx -f <(sinfo --noheader --Node --format=%N) | paste -sd,
}

polar_exclude() { # job: keep it off the bad nodes, and off those that its user has excluded
  local bad own
  bad=$(polar_bad_nodes "$RUN")
  [ -n "$bad" ] || return 0
  own=$(scontrol --oneliner show job "$1" | grep -o ' ExcNodeList=[^ ]*' | cut -d= -f2 | grep -v '(null)')
  for _ in 1 2 3 4 5; do # while a job is completing Slurm refuses
    scontrol update JobId="$1" ExcNodeList="$bad${own:+,$own}" 2>/dev/null && return
    sleep 1
  done
  polar_say "warning: job $1 could not be kept off $bad; it may fail the preflight there again"
}

polar_cancel_chain() { # what still waits under this job's name would fail in the same way
  if [ -n "${POLAR_CHAIN:-}" ]; then
    scancel --state=PENDING --user="$(id -un)" --name="$SLURM_JOB_NAME"
  fi
}

# --- Other jobs ------------------------------------------------------------------------------------------------------

polar_array() { # verb arguments...: from a shell, submit parts and what joins them; in a job, do one of these
  local verb=$1 part=() parts merge python
  shift
  if [ -n "${SLURMD_NODENAME:-}" ]; then # in a job, and not in the shell of salloc
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then part=(--part "$SLURM_ARRAY_TASK_ID/${POLAR_PARTS:-$SLURM_ARRAY_TASK_COUNT}"); fi
    polar_srun --ntasks=1 -- "$POLAR_PYTHON" -m megatron_polar "$verb" --workers "${SLURM_CPUS_PER_TASK:-1}" "$@" "${part[@]}"
    exit $?
  fi
  case ${1:-} in
  '' | -h | --help)
    sed -n '2,/^#SBATCH/s/^# \{0,1\}//p' "slurm/$verb.sh"
    exit "$([ -n "${1:-}" ] && echo 0 || echo 2)"
    ;;
  esac
  : "${POLAR_PARTS:=16}"
  case $POLAR_PARTS in 0* | *[!0-9]*) polar_die 2 "POLAR_PARTS=$POLAR_PARTS is not a number of parts; give 1 or more" ;; esac
  python=$(polar_login_python) || exit $?
  "$python" -m megatron_polar "$verb" --check "$@" || exit $?
  export POLAR_PARTS POLAR_HOME
  if [ -n "$POLAR_CPU_PARTITION" ]; then export SBATCH_PARTITION=$POLAR_CPU_PARTITION; fi
  parts=$(sbatch --parsable --array="0-$((POLAR_PARTS - 1))" "slurm/$verb.sh" "$@") || exit $?
  # Where a part fails, nothing is left waiting; the same command again does what is missing.
  merge=$(sbatch --parsable --dependency="afterok:$parts" --kill-on-invalid-dep=yes --output=slurm/logs/%x-%j.log "slurm/$verb.sh" "$@") || exit $?
  echo "submitted: $POLAR_PARTS parts as job $parts, and job $merge, which joins them; logs: slurm/logs/"
}

polar_one_task() { # command...
  polar_srun --ntasks=1 -- "$@"
  exit $?
}

polar_evaluate() { # arguments of `evaluate`: as many ranks as the job has tasks
  POLAR_LAUNCHER=srun
  export POLAR_LOG_DIR=slurm/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR
  mkdir -p "$POLAR_LOG_DIR"
  polar_ranks 1 "$POLAR_PYTHON" -m megatron_polar evaluate "$@"
  exit $?
}
