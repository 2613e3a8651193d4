#!/usr/bin/env bash
# GRPO with ms-swift on POLAR's rewards: the flags that concern the reward. Copy what you need into your own command.
#
#   bash examples/rl/swift/command.sh Qwen/Qwen2.5-7B-Instruct train.jsonl
#
# Each line of the data: {"messages": [{"role": "user", "content": ...}], "reference": the reference}.
set -euo pipefail
model=$1 data=$2
here=$(cd "$(dirname "$0")" && pwd)

export MEGATRON_POLAR_REWARD_URL=${MEGATRON_POLAR_REWARD_URL:-http://127.0.0.1:8000}

swift rlhf \
    --rlhf_type grpo \
    --model "$model" \
    --external_plugins "$here/plugin.py" \
    --reward_funcs polar \
    --dataset "$data" \
    --remove_unused_columns false \
    --num_generations 8 \
    --max_completion_length 1024 \
    --learning_rate 1e-6 \
    --beta 0 \
    --output_dir output
