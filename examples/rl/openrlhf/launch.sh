#!/usr/bin/env bash
# PPO with OpenRLHF on POLAR's rewards: the settings of the paper's runs (no KL, lambda 1, 1024 prompts a batch) and the
# flags that concern the reward. Copy what you need into your own command.
#
#   bash examples/rl/openrlhf/launch.sh Qwen/Qwen2.5-7B-Instruct prompts.jsonl
#
# Each line of the data: {"messages": [{"role": "user", "content": ...}], "label": {"prompt": the same messages,
# "reference": the reference}}. POLAR reads prompts without roles and templates, so the label repeats the prompt in its
# plain form; where no chat template is used, the label can be the reference alone.
#
# Without this package on the workers the reward server's own address does: --reward.remote_url
# http://HOST:8000/get_reward. No thinking is stripped and nothing normalised then, and labels must be texts or lists of them.
set -euo pipefail
model=$1 prompts=$2
here=$(cd "$(dirname "$0")" && pwd)

export MEGATRON_POLAR_REWARD_URL=${MEGATRON_POLAR_REWARD_URL:-http://127.0.0.1:8000}
export MEGATRON_POLAR_REWARD_MEAN=${MEGATRON_POLAR_REWARD_MEAN:--10} # POLAR-1.8B; -5 for POLAR-7B
export MEGATRON_POLAR_REWARD_STD=${MEGATRON_POLAR_REWARD_STD:-10}
# Workers see these; a bearer token they read from MEGATRON_POLAR_REWARD_API_KEY_FILE, a path that all of them can see.
runtime=$(python3 -c 'import json, os
print(json.dumps({"env_vars": {k: v for k, v in os.environ.items() if k.startswith("MEGATRON_POLAR_REWARD_")}}))')

# Before 2026 the flags were --remote_rm_url, --label_key, --input_key.
ray job submit --address="http://127.0.0.1:8265" --runtime-env-json="$runtime" -- \
    python3 -m openrlhf.cli.train_ppo_ray \
    --reward.remote_url "$here/reward_func.py" \
    --reward.normalize_enable \
    --data.prompt_dataset "$prompts" --data.input_key messages --data.label_key label --data.apply_chat_template \
    --data.max_len 8192 --rollout.max_new_tokens 4096 \
    --actor.model_name_or_path "$model" --actor.adam.lr 1e-6 --critic.adam.lr 1e-5 \
    --algo.kl.init_coef 0 \
    --rollout.batch_size 1024 --train.batch_size 1024 --train.max_epochs 1 \
    --actor.num_nodes 1 --actor.num_gpus_per_node 8 --critic.num_nodes 1 --critic.num_gpus_per_node 8 \
    --vllm.num_engines 8 --vllm.tensor_parallel_size 1 \
    --ckpt.output_dir checkpoints
