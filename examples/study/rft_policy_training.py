"""What becomes of the policy in the RFT study: warm start, GRPO on a reward, SFT, and the judge.

Each public function is a stage of one run, as in rft_rewards.py.
"""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from statistics import fmean

import rft_policies as policies
from rft_baselines import UNLEARNT, serve_unlearnt
from rft_problems import gold_answers, is_right, right_steps
from rft_rewards import answer_pairs, prompt_of, write_lines
from rft_sizes import Size, draw_parts
from rft_stages import in_fork, running

from megatron_polar import cli
from megatron_polar.errors import UserError
from megatron_polar.serve.reward_function import PREFIX

GRPO_SCRIPT = Path(__file__).resolve().parents[1] / "rl" / "trl" / "train.py"
NEAR = 10
"""Steps at either end of a run that its rewards are averaged over."""


def warm_up(directory: Path, size: Size, seed: int, run: int) -> dict:
    """The policy that is to be improved: the base model after a supervised start on answers of a mixture of habits.

    So it can do the sums, and has a right habit and wrong ones, each with some probability.
    """
    shared, own = directory.parent / "shared", seed + 1000 * (run + 1)
    problems = draw_parts(size, seed=seed, run=run).base
    pairs = answer_pairs(problems, habits=size.mixture, seed=own)
    outputs = {directory / "before": size.warm.steps}
    return policies.fit(shared / "base", pairs, size.warm, seed=own, device=size.device, outputs=outputs)


def prompts_and_references(size: Size, *, seed: int, run: int) -> list[tuple[str, str]]:
    """What GRPO and SFT are given: (prompt, right answer) of this run's problems."""
    problems = draw_parts(size, seed=seed, run=run).rft
    references = gold_answers(problems, seed=seed + 1000 * (run + 1) + 1)
    return [(prompt_of(problem), reference) for problem, reference in zip(problems, references, strict=True)]


def tune_on_references(directory: Path, size: Size, seed: int, run: int) -> dict:
    """SFT on the pairs that GRPO has as prompts and references, with as many steps and sequences a step."""
    pairs = prompts_and_references(size, seed=seed, run=run)
    outputs = {directory / "sft": size.sft.steps}
    return policies.fit(directory / "before", pairs, size.sft, seed=seed + run, device=size.device, outputs=outputs)


def improve(directory: Path, size: Size, seed: int, run: int, rewards: str) -> dict:
    """GRPO with examples/rl/trl/train.py on rewards of `megatron-polar serve`; `rewards`: a reward model, or one of
    UNLEARNT."""
    pairs = prompts_and_references(size, seed=seed, run=run)
    output = directory / f"grpo-{rewards}"
    shutil.rmtree(output, ignore_errors=True)
    lines = [{"prompt": prompt, "reference": reference} for prompt, reference in pairs]
    data = write_lines(directory / f"grpo-{rewards}.jsonl", lines)
    arguments = ["--model", directory / "before", "--data", data, "--output", output, "--seed", seed + run]
    arguments += ["--max-steps", size.grpo.steps, "--batch-size", size.grpo.batch]
    arguments += ["--num-generations", size.grpo.generations, "--learning-rate", size.grpo.lr]
    arguments += ["--max-completion-length", size.draw.max_tokens, *(["--cpu"] if size.device == "cpu" else [])]
    is_learnt = rewards not in UNLEARNT
    server = (_serve_rewards, directory / rewards, size.device) if is_learnt else (serve_unlearnt, rewards)
    with running("/ready", *server) as address:
        if in_fork(_grpo, address, [str(argument) for argument in arguments]):
            raise UserError("GRPO ended with an error; its message is in the log above")
    return reward_figures(json.loads((output / "trainer_state.json").read_text())["log_history"])


def _serve_rewards(checkpoint: Path, device: str, port: int) -> int:
    return cli.main(["serve", "--checkpoint", str(checkpoint), "--device", device, "--port", str(port)])


def _grpo(address: str, arguments: list[str]) -> None:
    """Run TRL's example as its reader would."""
    os.environ[f"{PREFIX}URL"] = address
    sys.argv = [str(GRPO_SCRIPT), *arguments]
    runpy.run_path(str(GRPO_SCRIPT), run_name="__main__")


def reward_figures(history: list[dict]) -> dict:
    """Rewards of a GRPO run: means of its first and last steps, and every step's for a plot.

    `..._equal` are shares of groups whose answers all have one reward: they teach nothing.
    """
    rows = [row for row in history if "rewards/trl_reward/mean" in row]
    rewards = [row["rewards/trl_reward/mean"] for row in rows]
    lengths = [row["completions/mean_length"] for row in rows]
    equal = [row["frac_reward_zero_std"] for row in rows]
    near = min(NEAR, len(rewards))
    return {
        "first_reward": fmean(rewards[:near]),
        "last_reward": fmean(rewards[-near:]),
        "first_length": fmean(lengths[:near]),
        "last_length": fmean(lengths[-near:]),
        "first_equal": fmean(equal[:near]),
        "last_equal": fmean(equal[-near:]),
        "rewards": rewards,
        "steps": len(rewards),
    }


# --- The judge -------------------------------------------------------------------------------------------------------


def judge(directory: Path, size: Size, seed: int, run: int, policy: str) -> dict:
    """Shares of right answers to the test problems by the rule, greedy and sampled at temperature 1 from all tokens.

    `..._work` are shares of answers whose steps are right, `..._characters` mean lengths: a reward that is hacked shows
    there first.
    """
    problems = draw_parts(size, seed=seed, run=run).test
    greedy = policies.Draw(size.draw.max_tokens, top_k=1)
    free = policies.Draw(size.draw.max_tokens, top_p=1.0, top_k=0)
    found, lines = {}, []
    for name, draw, repeats in (("greedy", greedy, 1), ("sampled", free, size.draws_per_test)):
        asked = [problem for problem in problems for _ in range(repeats)]
        texts = policies.answers(
            directory / policy, [prompt_of(p) for p in asked], draw, seed=seed + run, device=size.device
        )
        right = [is_right(problem, text) for problem, text in zip(asked, texts, strict=True)]
        work = [right_steps(problem, text) == 2 for problem, text in zip(asked, texts, strict=True)]
        lines += [
            {"prompt": problem.prompt, "answer": text, "right": ok, "draw": name}
            for problem, text, ok in zip(asked, texts, right, strict=True)
        ]
        found[name] = fmean(right)
        found[f"{name}_work"] = fmean(work)
        found[f"{name}_characters"] = fmean(map(len, texts))
    write_lines(directory / f"answers-{policy}.jsonl", lines)
    return {**found, "problems": len(problems)}
