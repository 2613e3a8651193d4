"""What the RFT study's figures look like: tables for the study's page, a page of its own, a drawing."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

REWARD_MODELS = {
    "finetuned-pretrained": "pre-trained and fine-tuned",
    "finetuned-base": "fine-tuned, not pre-trained",
    "pretrained": "pre-trained, not fine-tuned",
}
POLICIES = {
    "before": "before",
    **{f"grpo-{model}": f"GRPO, reward model {words}" for model, words in REWARD_MODELS.items()},
    "sft": "SFT on the same prompts and references",
}
DIFFERENCES = (
    ("grpo-finetuned-pretrained", "before"),
    ("grpo-finetuned-pretrained", "grpo-finetuned-base"),
    ("grpo-finetuned-pretrained", "grpo-pretrained"),
    ("grpo-finetuned-pretrained", "sft"),
    ("sft", "before"),
)


def write_section(found: dict) -> str:
    """The tables and what falls short, as rft.md in the output folder: a part of the study's page."""
    blocks = [block for part in (_task, _accuracies, _reward_models, _shortcomings, _origin) for block in part(found)]
    return "\n\n".join(blocks) + "\n"


def write_page(found: dict) -> str:
    """The same with a title, a drawing, and how it is made again: docs/rft.md."""
    machine, versions = found["machine"], ", ".join(f"{name} {text}" for name, text in found["versions"].items())
    minutes, cpu_minutes = found["seconds"] / 60, found["cpu_seconds"]["all"] / 60
    last = "; resumed, so wall time is not known" if found["resumed"] else f" in {minutes:.0f} minutes"
    spent = ", ".join(f"{n} {s / 60:.1f}" for n, s in found["cpu_seconds"].items() if n != "all" and s >= 30)
    blocks = [
        f"# Reinforcement fine-tuning in small (size `{found['size']}`)",
        _paragraph(f"""Made by `{found["command"]}`; every figure is in [rft.json](rft.json), with all settings, seeds
            and hashes. `make study-rft` does all runs of the size."""),
        "![reward over the steps of GRPO](rft.svg)",
        write_section(found).strip(),
        "## What it ran on",
        _paragraph(f"""{machine["processor"]}, device {machine["device"]}, one thread a process, {machine["jobs"]}
            run(s) at a time: {cpu_minutes:.0f} minutes of processor time{last}. Versions: {versions}."""),
        _paragraph(f"Minutes of processor time by stage, all runs: {spent}."),
    ]
    return "\n\n".join(blocks) + "\n"


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), width=118, break_long_words=False, break_on_hyphens=False)


def _shown(value: dict, *, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    if value["ci95"] is None:
        return f"{value['mean']:{form}}"
    return f"{value['mean']:{form}} ({value['ci95'][0]:{form}} to {value['ci95'][1]:{form}})"


def _each(value: dict) -> str:
    return ", ".join(f"{one:.3f}" for one in value["runs"])


def _task(found: dict) -> Iterator[str]:
    settings, sampled = found["settings"], found["shared"]["sample_trajectories"]
    counts, grpo, labels = settings["counts"], settings["grpo"], found["runs"][0]["draw_labels"]
    yield _paragraph(f"""The task is arithmetic in words: a number of 10 to {settings["largest"]} and two changes of 2
        to 9. The policy ({found["shared"]["fit_base"]["parameters"]:,} parameters) has a supervised start that is
        stopped early, and is then improved with TRL's GRPO ({grpo["steps"]} steps of {grpo["batch"]} answers,
        {grpo["generations"]} to a problem, no KL term) on rewards of `megatron-polar serve`. References are right
        answers to {counts["rft"]} problems. SFT takes the same prompts and references, with as many steps and sequences
        a step. A rule judges: the last number of an answer to a problem that nobody was trained on.""")
    yield _paragraph(f"""Reward models have the policy's shape. All begin as one base language model. Pre-training is on
        {sampled["train"]["trajectories"]:,} trajectories of {len(sampled["policies"])} policies, each with a habit of
        miscalculating; fine-tuning is on some {labels["rankings"]} rankings of answers of the policy to be improved,
        two in six drawn at temperature 1.5, so that malformed ones are among them.""")


def _accuracies(found: dict) -> Iterator[str]:
    settings, runs = found["settings"], len(found["runs"])
    yield _paragraph(f"""Shares of right answers to {settings["counts"]["test"]} held-out problems a run. {runs} run(s)
        from seed {found["seed"]}: each has a policy, labels, reward models, problems and GRPO
        of its own; the base model and the pool are shared. Brackets are 95 % intervals of the mean over runs (Student's
        t).""")
    lines = [
        "| policy | greedy | each run | sampled (temperature 1) | of these with right steps | characters |",
        "|---|---|---|---|---|---|",
    ]
    for policy, words in POLICIES.items():
        row = found["accuracy"][policy]
        shares = [_shown(row["greedy"]), _each(row["greedy"]), _shown(row["sampled"]), _shown(row["sampled_work"])]
        lines.append(f"| {words} | {' | '.join(shares)} | {row['sampled_characters']['mean']:.0f} |")
    yield "\n".join(lines)
    lines = ["| difference, run by run | greedy | sampled |", "|---|---|---|"]
    for name, row in found["differences"].items():
        one, other = name.split(" - ")
        told = " | ".join(_shown(row[kind], sign=True) for kind in ("greedy", "sampled"))
        lines.append(f"| {POLICIES[one]} − {POLICIES[other]} | {told} |")
    yield "\n".join(lines)


def _reward_models(found: dict) -> Iterator[str]:
    lines = [
        "| reward model | right over wrong answers of the policy | reward over GRPO | tokens of an answer over GRPO |",
        "|---|---|---|---|",
    ]
    for model, words in REWARD_MODELS.items():
        row = {name: value["mean"] for name, value in found["grpo"][model].items()}
        reward = f"{row['first_reward']:.2f} → {row['last_reward']:.2f}"
        length = f"{row['first_length']:.1f} → {row['last_length']:.1f}"
        lines.append(f"| {words} | {_shown(found['reward_models'][model])} | {reward} | {length} |")
    lines.append(f"| more words shared with the reference | {_shown(found['word_overlap'])} | | |")
    yield "\n".join(lines)
    pairs = sum(run["draw_labels"]["pairs"] for run in found["runs"])
    yield _paragraph(f"""Accuracy is on {pairs} pairs of a right and a wrong answer, all of the policy before GRPO, to
        the held-out problems. Rewards of different models have no common scale.""")


def _shortcomings(found: dict) -> Iterator[str]:
    yield "What did not work, and what is not clear:"
    lines = list(shortcomings(found)) or ["Every difference above is clear by its interval."]
    yield "\n".join(_paragraph(f"- {line}").replace("\n", "\n  ") for line in lines)


def shortcomings(found: dict) -> Iterator[str]:
    """A sentence with its figures for everything that one would expect of POLAR and that does not clearly hold."""
    if len(found["accuracy"]["before"]["greedy"]["runs"]) == 1:
        yield "There is one run only, so no difference above has an interval."
    for one, other in DIFFERENCES:
        row = found["differences"][f"{one} - {other}"]
        for kind in ("greedy", "sampled"):
            told = f"{_shown(row[kind], sign=True)}, {kind}"
            if row[kind]["ci95"] is None:
                if row[kind]["mean"] < 0:
                    yield f"{POLICIES[one]} is worse than {POLICIES[other]} in this run: {told}."
            elif row[kind]["ci95"][1] < 0:
                yield f"{POLICIES[one]} is worse than {POLICIES[other]}: {told}."
            elif row[kind]["ci95"][0] <= 0:
                yield f"{POLICIES[one]} is not clearly better than {POLICIES[other]}: {told}."
    for model, words in REWARD_MODELS.items():
        accuracy, overlap = found["reward_models"][model], found["word_overlap"]["mean"]
        if accuracy["ci95"] and accuracy["ci95"][0] <= 0.5:
            yield f"The reward model {words} does not clearly tell right from wrong: {_shown(accuracy)}."
        elif accuracy["mean"] < overlap:
            yield f"Counting words shared with the reference ({overlap:.3f}) beats the reward model {words}."
        grpo, policy = found["grpo"][model], found["accuracy"][f"grpo-{model}"]["greedy"]["mean"]
        before = found["accuracy"]["before"]["greedy"]["mean"]
        if grpo["last_reward"]["mean"] > grpo["first_reward"]["mean"] and policy < before:
            yield f"""GRPO raises the reward of the model {words}, and right answers become fewer ({before:.3f} to
                {policy:.3f}, greedy)."""


def _origin(found: dict) -> Iterator[str]:
    hashes = ", ".join(f"{name} `{digest[:16]}…`" for name, digest in found["sha256"].items())
    yield _paragraph(f"SHA-256 (whole ones in the JSON file): {hashes}. Command: `{found['command']}`.")


def draw_rewards(found: dict, path: Path) -> None:
    """Rewards over GRPO's steps, less each run's first ones: reward models have no common scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, (model, words) in enumerate(REWARD_MODELS.items()):
        for index, one in enumerate(found["runs"]):
            curve = one[f"grpo-{model}"]
            rise = [reward - curve["first_reward"] for reward in curve["rewards"]]
            axes.plot(range(1, len(rise) + 1), rise, color=f"C{number}", alpha=0.7, label=None if index else words)
    axes.set_xlabel("step of GRPO")
    axes.set_ylabel("reward, less the mean of the first steps")
    axes.legend(title="reward model")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
