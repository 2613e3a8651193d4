"""GRPO with TRL on POLAR's rewards, from a JSONL file with a prompt and a reference in every line.

    export MEGATRON_POLAR_REWARD_URL=http://127.0.0.1:8000
    python examples/rl/trl/train.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --output policy

    {"prompt": [{"role": "user", "content": "..."}], "reference": "..."}

Prompts are texts or lists of messages, and so are references; a list of references is averaged over. The server and
what is done to rewards come from MEGATRON_POLAR_REWARD_* variables (docs/rl.md); a reward that cannot be had ends the
run.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_polar.errors import UserError
from megatron_polar.serve.adapters import trl_reward
from megatron_polar.serve.reward_function import configured


def main() -> None:
    """Train, and leave the policy and trainer_state.json (with the rewards of every step) in --output."""
    options = _options()
    try:
        configured()  # wrong variables are said here, not in the middle of the first step
    except UserError as error:
        sys.exit(f"error: {error}")
    from datasets import Dataset  # below: TRL takes its time to load
    from trl import GRPOConfig, GRPOTrainer

    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    config = GRPOConfig(
        output_dir=str(options.output),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        num_generations=options.num_generations,
        max_completion_length=options.max_completion_length,
        learning_rate=options.learning_rate,
        beta=0.0,  # no KL term, as in POLAR's published runs
        seed=options.seed,
        use_cpu=options.cpu,
        bf16=not options.cpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = GRPOTrainer(options.model, reward_funcs=trl_reward, args=config, train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model()
    trainer.save_state()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the policy: a directory, or a name on the Hugging Face hub")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with prompt and reference")
    parser.add_argument("--output", type=Path, required=True, help="directory for the trained policy")
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=16, help="answers a step and device, a multiple of the next")
    parser.add_argument("--num-generations", type=int, default=8, help="answers a prompt")
    parser.add_argument("--max-completion-length", type=int, default=1024, help="tokens of an answer")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU in fp32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
