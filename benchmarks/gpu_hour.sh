#!/usr/bin/env bash
# The first hour on a Hopper GPU, the most valuable part first. Every part has a time limit and leaves its result in a
# file before the next begins; what a part or a lease did not finish is taken up by the next call with the same --output.
#
#   benchmarks/gpu_hour.sh --dry-run                                  # what would run, and for how long
#   benchmarks/gpu_hour.sh --output gpu                               # where requirements-gpu.txt is installed
#   benchmarks/gpu_hour.sh --output gpu --te te.tar.xz --wheels DIR   # torch alone is there, and no package index
#   benchmarks/gpu_hour.sh --output gpu --minutes 9 --only parity throughput_7b
set -uo pipefail

usage() {
  echo "usage: $0 [--dry-run] [--output DIR] [--minutes N] [--te BUNDLE.tar.xz] [--wheels DIR] [--only PART...]"
  echo "parts: ${names[*]}"
}

refuse() {
  echo "error: $1" >&2
  usage >&2
  exit 2
}

# --- Parts: name, minutes at most, command ---------------------------------------------------------------------------

PYTHON=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/.." && pwd) || exit 1
layers=${LAYERS:-16} # of the 7B shape: 110 GB at the peak; LAYERS=8 for 80 GB
names=() limits=() commands=()
part() {
  names+=("$1")
  limits+=("$2")
  commands+=("${*:3}")
}

part environment 2 "$PYTHON benchmarks/gpu_environment.py"
part parity 4 "$PYTHON -m pytest -v -p no:cacheprovider tests/test_gpu.py"
part runs 5 "$PYTHON -m pytest -v -p no:cacheprovider tests/test_gpu_runs.py -k score"
part throughput_7b 5 "$PYTHON benchmarks/throughput.py --preset polar_7b --layers $layers --rows 2 --steps 5 --fp8 off tensorwise"
part throughput_1_8b 4 "$PYTHON benchmarks/throughput.py --preset polar_1_8b --candidates 2 --rows 3 --steps 4"
part resumes 7 "$PYTHON -m pytest -v -p no:cacheprovider tests/test_gpu_runs.py -k resumed"
part twins 8 "$PYTHON benchmarks/fp8_twins.py --variants bf16 tensorwise --seeds 0 1 2 3 4 5 --batch 32 --jobs 4 --output OUTPUT/fp8_twins.md"
part layouts 5 "$PYTHON benchmarks/layouts.py --layers 8 --candidates 2 4 --comparisons 16"
part recipes 5 "$PYTHON benchmarks/throughput.py --preset polar_7b --layers $layers --rows 2 --steps 5 --candidates 2 --layouts shared_prefix --fp8 off blockwise delayed --profile"
part fp8_weights 4 "$PYTHON benchmarks/throughput.py --preset polar_7b --layers $layers --rows 2 --steps 5 --candidates 2 --layouts shared_prefix --fp8 tensorwise blockwise --fp8-weights"
part no_fusion 3 "$PYTHON benchmarks/throughput.py --preset polar_7b --layers $layers --rows 2 --steps 5 --candidates 2 --layouts shared_prefix --fp8 off tensorwise --no-fusion"
part trl 5 "$PYTHON benchmarks/trl_reward_trainer.py --layers 4 --hidden-size 2048 --global-batch-size 16 --trl-batch-sizes 1 8 --output OUTPUT/trl_reward_trainer.md"

# --- Options ---------------------------------------------------------------------------------------------------------

dry_run=false output=gpu_hour minutes=60 bundle='' wheels='' only=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=true ;;
    --output | --minutes | --te | --wheels)
      [ $# -ge 2 ] || refuse "$1 needs a value"
      case $1 in
        --output) output=$2 ;;
        --minutes) minutes=$2 ;;
        --te) bundle=$2 ;;
        --wheels) wheels=$2 ;;
      esac
      shift
      ;;
    --only)
      while [ $# -ge 2 ] && [ "${2#--}" = "$2" ]; do
        [[ " ${names[*]} " == *" $2 "* ]] || refuse "--only $2 is no part"
        only+=("$2")
        shift
      done
      [ ${#only[@]} -gt 0 ] || refuse "--only needs at least one part"
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) refuse "$1 is no option" ;;
  esac
  shift
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || refuse "--minutes $minutes must be a whole number above 0"
for path in "$bundle" "$wheels"; do
  [ -z "$path" ] || [ -e "$path" ] || { echo "error: $path: no such file or directory" >&2 && exit 2; }
done

# --- The environment: no pip, an archive and wheels are unpacked side by side ----------------------------------------

if ! $dry_run; then
  mkdir -p "$output" || exit 2
  output=$(cd "$output" && pwd)
  site=$output/site
  if [ -n "$bundle" ] && [ ! -e "$site/.bundle" ]; then
    mkdir -p "$site"
    "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' "$bundle" "$site" || exit 2
    touch "$site/.bundle"
  fi
  if [ -n "$bundle" ] && [ -z "${CUDNN_HOME:-}" ]; then
    # Transformer Engine would take a system's cuDNN beside torch's own, and parts of both do not go together.
    CUDNN_HOME=$("$PYTHON" -c 'import nvidia.cudnn; print(list(nvidia.cudnn.__path__)[0])' 2>/dev/null) && export CUDNN_HOME
  fi
  if [ -n "$wheels" ]; then
    mkdir -p "$site"
    for wheel in "$wheels"/*.whl; do
      "$PYTHON" -m zipfile -e "$wheel" "$site" || exit 2
    done
  fi
fi
cd "$here" || exit 1
export PYTHONPATH=$here${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # tests hide GPUs unless it is set

# --- Run -------------------------------------------------------------------------------------------------------------

failed=0 end=$((SECONDS + 60 * minutes))
for number in "${!names[@]}"; do
  name=${names[$number]} limit=$((60 * limits[number])) command=${commands[$number]//OUTPUT/$output}
  [ ${#only[@]} -eq 0 ] || [[ " ${only[*]} " == *" $name "* ]] || continue
  if $dry_run; then
    printf '%-16s %2d min  %s\n' "$name" "${limits[$number]}" "$command"
    continue
  fi
  [ -e "$output/$name.done" ] && echo "$name: done before" && continue
  left=$((end - SECONDS))
  if [ $left -lt 60 ]; then
    echo "$name: no time left in $minutes minutes"
    failed=1
    continue
  fi
  [ $limit -le $left ] || limit=$left
  started=$SECONDS
  read -ra words <<<"$command"
  timeout --kill-after=20 $limit "${words[@]}" >"$output/$name.txt" 2>"$output/$name.log"
  status=$?
  said="$name: status $status after $((SECONDS - started)) s"
  [ $status -eq 124 ] && said="$name: stopped after $limit s; $name.txt has what was printed by then"
  if [ $status -eq 0 ]; then
    touch "$output/$name.done"
  else
    failed=1
    said+="; the end of $output/$name.log: $(tail -n 1 "$output/$name.log")"
  fi
  echo "$said" | tee -a "$output/summary.txt"
  if [ "$name" = environment ] && [ $status -ne 0 ]; then
    cat "$output/$name.txt" "$output/$name.log"
    exit 1
  fi
done
exit $failed
