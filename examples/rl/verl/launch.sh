#!/usr/bin/env bash
# PPO with verl on POLAR's rewards: the settings of POLAR's published examples (no KL, GAE 1/1, one answer a prompt) and
# the keys that concern the reward. Copy what you need into your own command.
#
#   bash examples/rl/verl/launch.sh Qwen/Qwen2.5-7B-Instruct train.parquet test.parquet
#
# Each row of the data has: prompt (messages), data_source, reward_model = {"style": "polar", "ground_truth": reference},
# extra_info = {"prompt": the same messages}.
set -euo pipefail
model=$1 train=$2 test=$3
here=$(cd "$(dirname "$0")" && pwd)

# Where Ray workers run elsewhere, give them these through the job's runtime environment (env_vars).
export MEGATRON_POLAR_REWARD_URL=${MEGATRON_POLAR_REWARD_URL:-http://127.0.0.1:8000}
export MEGATRON_POLAR_REWARD_ENGINE=${MEGATRON_POLAR_REWARD_ENGINE:-megatron-polar}
# export MEGATRON_POLAR_REWARD_MEAN=-10 MEGATRON_POLAR_REWARD_STD=10   # as the paper's runs; POLAR's verl examples: raw

# `naive` asks for one answer at a time, many at once; the client keeps the number of requests within bounds. Versions that
# have the `batch` manager (verl 0.5, and others that register it) hand over a chunk: name=compute_score_batch.
# Before 2026 the keys were: reward_model.reward_manager=batch custom_reward_function.path=... custom_reward_function.name=...
python3 -m verl.trainer.main_ppo \
    reward.custom_reward_function.path="$here/reward.py" \
    reward.custom_reward_function.name=compute_score_async \
    reward.reward_manager.name=naive \
    algorithm.adv_estimator=gae algorithm.gamma=1.0 algorithm.lam=1.0 algorithm.use_kl_in_reward=False \
    data.train_files="$train" data.val_files="$test" \
    data.train_batch_size=1024 data.max_prompt_length=1024 data.max_response_length=1024 \
    actor_rollout_ref.model.path="$model" \
    actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=1 \
    critic.model.path="$model" critic.optim.lr=1e-5 \
    trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.total_epochs=1
