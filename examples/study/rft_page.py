"""What the RFT study's figures look like: tables and a drawing for the study's page."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from verdicts import HOLDS, REFUTED, UNCLEAR

REWARD_MODELS = {
    "finetuned-pretrained": "pre-trained and fine-tuned",
    "finetuned-base": "fine-tuned, not pre-trained",
    "pretrained": "pre-trained, not fine-tuned",
}
REWARDS = {**REWARD_MODELS, "words": "words shared with the reference", "rule": "the rule itself"}
"""What GRPO is done with: reward models, a count that needs none, and the rule that judges, which none can beat."""
POLICIES = {
    "before": "before",
    **{f"grpo-{model}": f"GRPO, reward model {words}" for model, words in REWARD_MODELS.items()},
    "grpo-words": "GRPO, words shared with the reference as reward",
    "grpo-rule": "GRPO, the rule itself as reward",
    "sft": "SFT on the same prompts and references",
}
KNOWS = 0.95
"""Share of right answers from which on a base model knows its sums, so that habits are what remains to be learnt."""
_AVERAGED = 8
"""Steps whose rewards are averaged in the drawing: each has other problems."""
BEST, WORDS, RULE = "grpo-finetuned-pretrained", "grpo-words", "grpo-rule"
CLAIMS = {
    (RULE, "before"): "GRPO works here at all: the rule itself as reward improves the policy",
    (BEST, "before"): "A reward model that is pre-trained and fine-tuned improves it",
    (BEST, "grpo-finetuned-base"): "by more than one that is not pre-trained",
    (BEST, "grpo-pretrained"): "by more than one that is not fine-tuned",
    (BEST, WORDS): "by more than counting the words shared with the reference",
    (BEST, "sft"): "by more than SFT on the same prompts and references",
}
"""What one would expect of POLAR: the first of two policies is the better one."""
DIFFERENCES = (
    *CLAIMS,
    ("grpo-finetuned-base", "before"),
    ("grpo-pretrained", "before"),
    (WORDS, "before"),
    ("sft", "before"),
    (BEST, RULE),
)


def write_section(found: dict) -> str:
    """The tables and what falls short, as rft.md in the output folder: a part of the study's page."""
    parts = (_task, _verdicts, _accuracies, _reward_models, _shortcomings, _origin)
    return "\n\n".join(block for part in parts for block in part(found)) + "\n"


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
    counts, grpo, pretrain = (settings[name] for name in ("counts", "grpo", "pretrain"))
    labels = found["runs"][0]["draw_labels"]
    exact, habits = found["shared"]["fit_policies"]["exact"], settings["mixture"]
    told = ", ".join(f"`{habit}` {share:.2f}" for habit, share in habits.items())
    yield _paragraph(f"""The task is arithmetic in words: a number of 10 to {settings["largest"]} and two changes of 2
        to 9. The base model is this section's own ({settings["shape"]["num_layers"]} layers,
        {found["shared"]["fit_base"]["parameters"]:,} parameters). How well it knows its sums: a fit of it on right
        answers has {exact["greedy"]:.3f} of {exact["problems"]} held-out problems, greedy. The policy to
        be improved is a fit of it on a mixture of habits, drawn anew for every answer ({told}). TRL's GRPO
        ({grpo["steps"]} steps of {grpo["batch"]} answers, {grpo["generations"]} to a problem, no KL term) is to lead it
        to the right habit, on rewards of `megatron-polar serve`, or on one of two that nobody has learnt, behind the
        same address: the rule, and the words that an answer shares with its reference, as a share of the words of
        both. References are right answers to {counts["rft"]} problems. SFT takes the same prompts and
        references, with as many steps and sequences a step. A rule judges: the last number of an
        answer to a problem that nobody was trained on.""")
    yield _paragraph(f"""Reward models have the policy's shape. All begin as one base language model, which read
        documents in which an author answers a problem twice in one habit, half of the authors in the right one, the
        others in those of the pool. Pre-training is {pretrain["steps"]} steps of {pretrain["batch"]} comparisons, the
        first {pretrain["warmup_fraction"]:.0%} of them warm-up, on
        {sampled["train"]["trajectories"]:,} trajectories of {len(sampled["policies"])} policies, each with a habit or
        a fit that was not finished; the mixture has habits that are not among theirs ({_names(found)}). Fine-tuning is
        on some {labels["rankings"]}
        rankings of answers of the policy to be improved, two in {settings["answers_per_label"] + 2} drawn at
        temperature 1.5, so that malformed ones are among them.""")


def _names(found: dict) -> str:
    seen = {*found["settings"]["habits"]}
    return ", ".join(f"`{habit}`" for habit in found["settings"]["mixture"] if habit not in seen) or "none"


def _verdicts(found: dict) -> Iterator[str]:
    yield _paragraph("""A claim holds where the 95 % interval of the difference over runs lies above zero, in sampled
        answers; for one run nothing is said.""")
    yield "\n".join(["| claim | holds here | difference, sampled |", "|---|---|---|", *map(_row, verdicts(found))])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def verdicts(found: dict) -> Iterator[tuple[str, str, str]]:
    """Every claim, whether the interval over runs bears it out, and the figures."""
    for (one, other), claim in CLAIMS.items():
        row = found["differences"][f"{one} - {other}"]["sampled"]
        yield claim, _word(row["ci95"]), _shown(row, sign=True)


def _word(span: Sequence[float] | None) -> str:
    if span is None:
        return "one run only"
    if span[0] > 0:
        return HOLDS
    return REFUTED if span[1] < 0 else UNCLEAR


def _accuracies(found: dict) -> Iterator[str]:
    settings, runs = found["settings"], len(found["runs"])
    yield _paragraph(f"""Shares of right answers to {settings["counts"]["test"]} held-out problems a run. {runs} run(s)
        from seed {found["seed"]}: each has a policy, labels, reward models, problems and GRPO
        of its own; the base model and the pool are shared. Brackets are 95 % intervals of the mean over runs (Student's
        t).""")
    lines = [
        "| policy | greedy | each run | sampled (temperature 1) | right steps, sampled | characters |",
        "|---|---|---|---|---|---|",
    ]
    for policy, words in POLICIES.items():
        row = found["accuracy"][policy]
        shares = [_shown(row["greedy"]), _each(row["greedy"]), _shown(row["sampled"]), _shown(row["sampled_work"])]
        lines.append(f"| {words} | {' | '.join(shares)} | {row['sampled_characters']['mean']:.0f} |")
    yield "\n".join(lines)
    yield _paragraph("""A habit that is not the right one gives some problems the right result: `no_carry` where nothing
        is carried, `digits_swapped` where both digits are the same. Right
        steps: both steps of an answer are right, whatever it concludes. Characters: an answer's, on average.""")
    lines = ["| difference, run by run | greedy | sampled |", "|---|---|---|"]
    for name, row in found["differences"].items():
        one, other = name.split(" - ")
        told = " | ".join(_shown(row[kind], sign=True) for kind in ("greedy", "sampled"))
        lines.append(f"| {POLICIES[one]} − {POLICIES[other]} | {told} |")
    yield "\n".join(lines)


def _reward_models(found: dict) -> Iterator[str]:
    accuracies = {**found["reward_models"], "words": found["word_overlap"]}
    lines = [
        "| reward | right over wrong answers of the policy | over GRPO | answers' tokens | groups of one reward |",
        "|---|---|---|---|---|",
    ]
    for model, words in REWARDS.items():
        row = {name: value["mean"] for name, value in found["grpo"][model].items()}
        reward = f"{row['first_reward']:.2f} → {row['last_reward']:.2f}"
        length = f"{row['first_length']:.1f} → {row['last_length']:.1f}"
        equal = f"{row['first_equal']:.2f} → {row['last_equal']:.2f}"
        accuracy = _shown(accuracies[model]) if model in accuracies else ""
        lines.append(_row((words, accuracy, reward, length, equal)))
    yield "\n".join(lines)
    pairs = sum(run["draw_labels"]["pairs"] for run in found["runs"])
    yield _paragraph(f"""Accuracy is on {pairs} pairs of a right and a wrong answer, all of the policy before GRPO, to
        the held-out problems. Rewards of different models have no common scale. Arrows lead from the first to the last
        steps. A group is all answers to one problem; where all have one reward it teaches nothing.""")


def _shortcomings(found: dict) -> Iterator[str]:
    yield "What did not work, and what is not clear:"
    lines = list(shortcomings(found)) or ["Every difference above is clear by its interval."]
    yield "\n".join(_paragraph(f"- {line}").replace("\n", "\n  ") for line in lines)


def shortcomings(found: dict) -> Iterator[str]:
    """A sentence with its figures for everything that one would expect of POLAR and that does not clearly hold."""
    exact = found["shared"]["fit_policies"]["exact"]
    if exact["greedy"] < KNOWS:
        yield f"""The base model does not know its sums well: a fit of it on right answers has {exact["greedy"]:.3f} of
            {exact["problems"]} held-out problems, and {KNOWS} was aimed at."""
    if len(found["accuracy"]["before"]["greedy"]["runs"]) == 1:
        yield "There is one run only, so no difference above has an interval."
    for one, other in (*CLAIMS, ("sft", "before")):
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
        grpo, change = found["grpo"][model], found["differences"][f"grpo-{model} - before"]["greedy"]
        if grpo["last_reward"]["mean"] > grpo["first_reward"]["mean"] and change["mean"] < 0:
            is_clear = change["ci95"] is None or change["ci95"][1] < 0
            became = "become fewer" if is_clear else "do not become more, though not clearly fewer"
            yield f"""GRPO raises the reward of the model {words}, and right answers {became}:
                {_shown(change, sign=True)}, greedy."""


def _origin(found: dict) -> Iterator[str]:
    hashes = ", ".join(f"{name} `{digest[:16]}…`" for name, digest in found["sha256"].items())
    yield _paragraph(f"SHA-256 (whole ones in the JSON file): {hashes}. Command: `{found['command']}`.")
    machine, versions = found["machine"], ", ".join(f"{name} {text}" for name, text in found["versions"].items())
    spent = ", ".join(f"{n} {s / 60:.1f}" for n, s in found["cpu_seconds"].items() if n != "all" and s >= 30)
    yield _paragraph(f"""Ran on {machine["processor"]} ({machine["device"]}), one thread a process:
        {found["cpu_seconds"]["all"] / 60:.0f} minutes of processor time, of these by stage, all runs: {spent or "-"}.
        Versions: {versions}; scripts as of commit {found["commit"] or "unknown"}.""")


def draw_rewards(found: dict, path: Path) -> None:
    """Rewards over GRPO's steps, a panel a reward, since reward models have no common scale: runs, and their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(REWARDS), figsize=(3 * len(REWARDS), 3.2), sharex=True)
    for axes, (model, words) in zip(panels, REWARDS.items(), strict=True):
        curves = [_averaged(run[f"grpo-{model}"]["rewards"]) for run in found["runs"]]
        for index, curve in enumerate(curves):
            axes.plot(range(1, len(curve) + 1), curve, color="C0", alpha=0.35, label=None if index else "a run")
        mean = [fmean(steps) for steps in zip(*curves, strict=True)]
        axes.plot(range(1, len(mean) + 1), mean, color="C0", linewidth=2, label="mean")
        axes.set_title(textwrap.fill(words, width=24, break_on_hyphens=False), fontsize=10)
        axes.set_xlabel("step of GRPO")
    panels[0].set_ylabel(f"reward, mean of {_AVERAGED} steps")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _averaged(values: Sequence[float]) -> list[float]:
    """Of each value and those before it, `_AVERAGED` at most."""
    return [fmean(values[max(0, end - _AVERAGED) : end]) for end in range(1, len(values) + 1)]
