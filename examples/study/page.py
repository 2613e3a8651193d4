"""study.md: the figures of study.json in tables and plain words; nothing in it is typed by hand."""

import hashlib
import textwrap
from collections.abc import Iterator, Sequence
from statistics import correlation

from shortcomings import TASK_TITLES, interval, shortcomings
from verdicts import verdicts

SETS = {
    "seen": "seen policies, new prompts",
    "unseen": "unseen policies, new prompts",
    "real": "unseen models' real answers",
}
NOT_MEASURED = "Not measured in this run."
ARM_TITLES = {
    "pretrained_reference": "pre-trained + reference (POLAR)",
    "reference_longer_base": "reference only (from the base model that read longer)",
    "reference_only": "reference only (from the base model)",
    "neither": "neither (from the base model, empty reference)",
}


def write_page(figures: dict, *, rft: str) -> str:
    """The whole page; `rft`: the text about reinforcement fine-tuning, empty where that was not run."""
    before = (_head, _verdicts, _policies, _base, _start, _ablations, _scaling, _finetune, _zero_shot)
    blocks = [block for part in before for block in part(figures)]
    blocks += ["## Reinforcement fine-tuning", rft or "Not part of this run."]
    blocks += [block for part in (_failures, _repeat) for block in part(figures)]
    return "\n\n".join(blocks) + "\n"


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), width=118, break_long_words=False, break_on_hyphens=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table; columns in `numbers` are set to the right."""
    rule = ["---:" if place in numbers else "---" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _head(figures: dict) -> Iterator[str]:
    machine, minutes = figures["machine"], sum(figures["seconds"].values()) / 60
    cpu_minutes = sum(figures["cpu_seconds"].values()) / 60
    used = f", and {cpu_minutes:.0f} of processor time" if cpu_minutes else ""
    yield f"# What POLAR's claims come to here: a study in small (size `{figures['size']}`)"
    yield _paragraph("""Made by `python examples/study/run.py`; every figure of this page is in
        [study.json](study.json), with the SHA-256 of every public file, all settings, seeds and commands.""")
    yield _paragraph(f"""Ran on {machine["processor"]} ({machine["device"]}), {machine["parallel_jobs"]} jobs at a time
        with {machine["threads_a_job"]} thread each. The jobs took {minutes:.0f} minutes, added up{used}; one that was
        interrupted counts from where it went on. Versions:
        {", ".join(f"{name} {version}" for name, version in figures["versions"].items())}.""")
    if figures["generated"]:
        yield _paragraph("""**All text here was generated for a trial of the machinery, and models are tiny and hardly
            trained: no figure of this page is a result**, and what it says of models, problems and public sets is true
            of the study on public data alone.""")
    yield _paragraph("""POLAR's claims are that a reward model which learns to tell policies apart, from their samples
        alone, knows something of every preference: that it tells policies and prompts apart which it never saw, that
        more of everything helps by a power law, and that fine-tuning with references from there beats fine-tuning from
        the language model. Models as small as these cannot show how good that gets. They can show whether each
        effect is there.""")
    yield _paragraph("""Accuracies are shares of right pairs on held-out data; 0.5 is chance. Brackets are 95 %
        intervals of a bootstrap over prompts (or problems), pooled over seeds: they say what other prompts would
        change. Intervals over seeds (Student's t) say what other trainings would.""")
    yield _paragraph("""Knobs were chosen by looking at these held-out sets, at runs of fewer steps with some of the
        same seeds ([log.md](log.md)). No set was kept aside for the end.""")
    yield _paragraph("""Another processor rounds in another way, and changes a training as another seed would:
        [log.md](log.md) has the figures of two.""")
    if not figures["complete"]:
        yield "**This is a report on a part of the study**: the rest had not been run when it was written."


def _verdicts(figures: dict) -> Iterator[str]:
    yield "## In short"
    yield _paragraph("""A claim holds where its interval over prompts lies on the right side altogether, and that over
        seeds does so, too; for two settings, where their intervals over prompts do not overlap and that of the
        difference over seeds (Welch) lies on the right side. Counting words is compared by the
        difference on the same pairs. "For these seeds" says that prompts bear it out and seeds do not, "for one seed"
        that there was one.""")
    yield _table(("claim", "holds here", "figures"), list(verdicts(figures)))


def _policies(figures: dict) -> Iterator[str]:
    found, settings = figures["policies"], figures["settings"]
    total = sum(counts["trajectories"] for counts in found["sampled"].values())
    yield "## Policies"
    yield _paragraph(f"""{found["seen"]} policies to train on and {found["unseen"]} that training never sees;
        {found["training_trajectories"]:,} trajectories to train on, {total:,} with the held-out ones. They are embedded
        imitations ([policies.md](policies.md)): n-gram models of a real model's published answers, mixed with its
        answer to the prompt at hand. So two trajectories of one policy share content and style, as two samples of a
        language model do.""")
    yield "\n".join(
        _paragraph(line).replace("\n", "\n  ")
        for line in (
            f"""- {len(found["seen_models"])} + {len(found["unseen_models"])} models of AlpacaEval; unseen:
            {", ".join(found["unseen_models"])}.""",
            f"""- {len(found["seen_writers"])} + {len(found["unseen_writers"])} writers of GSM8K solutions: the
            published one, others that miscalculate, on the way or in the result alone, and others that solve another
            problem. Of every solution they
            imitate the ending, the result included; unseen: {", ".join(found["unseen_writers"])}.""",
        )
    )
    yield _paragraph("""Real answers cannot be trajectories: there is one a model and prompt, and POLAR needs two. They
        are what policies imitate, and the last of the held-out sets below: the reference is an imitation's, and the
        real answer of its model is compared with another model's.""")
    rows = [
        [name, *(f"{counts[k]:,}" for k in ("prompts", "trajectories", "words"))]
        for name, counts in found["sampled"].items()
    ]
    yield _table(("sampled", "prompts", "trajectories", "words"), rows, numbers=(1, 2, 3))
    yield _paragraph(f"""Trajectories end at {settings["alpaca_max_words"]} (AlpacaEval) and
        {settings["gsm8k_max_words"]} (GSM8K) words and marks. Held-out prompts are AlpacaEval's `eval` folder and a
        sixth of GSM8K's training problems, by a hash. Text about them is in no training trajectory, in no base model
        and not in the tokenizer; nor is text of the unseen models, nor what fine-tuning is judged on.
        Base models do read answers of seen models, cut, that are among AlpacaEval's pairs to fine-tune on.""")


def _base(figures: dict) -> Iterator[str]:
    yield "## Base models"
    yield _paragraph("""Llama's shape, trained with transformers on the same text (a prompt and both trajectories of one
        policy; a prompt and one real answer, said twice), a document a row, and brought in with `convert from-hf
        --head init`. Matrices of the layers are trained with Muon, all else with AdamW. `longer` is the main size, with
        about as many tokens more as pre-training reads.""")
    counted = ("parameters", "non_embedding_parameters", "tokens")
    rows = [
        [name, *(f"{one[key]:,}" for key in counted), f"{one['held_out_loss']:.3f}", f"{one['seconds']:.0f}"]
        for name, one in figures["base_models"].items()
    ]
    head = (
        "size",
        "parameters, output matrix included",
        "of its layers",
        "tokens",
        "loss on documents set aside",
        "seconds",
    )
    yield _table(head, rows, numbers=(1, 2, 3, 4, 5))


def _start(figures: dict) -> Iterator[str]:
    pretrained = figures["pretraining"]
    yield "## Pre-training"
    if not pretrained["settings"]:
        yield NOT_MEASURED
        return
    size = figures["settings"]
    yield _paragraph(f"""{size["num_steps"]} steps, the first {size["warmup_fraction"]:.0%} of them warm-up, of
        {size["global_batch_size"]} comparisons with K = {size["main_candidates"]} candidates each: one of the
        reference's policy, the others of other policies. The main size, from its base model; fine-tuning begins from
        these runs:""")
    yield _settings_table(pretrained, "main", lambda g: f"{g['shape']}, {g['start']}", "size, start")
    main = pretrained["settings"].get(pretrained["claims"]["main"])
    if main:
        told = "; ".join(f"{name}: {', '.join(f'{one:.3f}' for one in main[name]['each_seed'])}" for name in SETS)
        yield _paragraph(f"Each seed, {told}.")
    yield "![accuracy over steps and sizes](study/start.svg)"
    if size["sweep_share"] < 1:
        yield _paragraph(f"""Sizes, the start from random weights and K are compared after {size["sweep_share"]:g} of
            the steps, each time with a whole schedule.""")
    yield _settings_table(pretrained, "start", lambda g: f"{g['shape']}, {g['start']}", "size, start")
    some = next(iter(pretrained["settings"].values()))
    rows = [[SETS[name], f"{some[name]['word_overlap']:.3f}", f"{some[name]['longer']:.3f}"] for name in SETS]
    yield "What learns nothing:"
    yield _table(("set", "the one that shares more words with the reference", "the longer one"), rows, numbers=(1, 2))


def _settings_table(pretrained: dict, table: str, name, title: str) -> str:
    if not pretrained["tables"][table]:
        return NOT_MEASURED
    rows = []
    for key in pretrained["tables"][table]:
        group = pretrained["settings"][key]
        row = [name(group), f"{group['parameters']['all']:,}", f"{group['comparisons']:,}", str(len(group["seeds"]))]
        row += [interval(group[one]) for one in SETS]
        rows.append([*row, f"{group['seen']['loss']:.4f}"])
    head = (title, "parameters", "comparisons", "seeds", *SETS.values(), "loss, seen policies")
    return _table(head, rows, numbers=(1, 2, 3, 7))


def _ablations(figures: dict) -> Iterator[str]:
    pretrained = figures["pretraining"]
    yield "## Pre-training: K, and the amount of data"
    if not pretrained["settings"]:
        yield NOT_MEASURED
        return
    yield "![accuracy over K and data](study/ablations.svg)"
    yield _paragraph("""From the base model of the main size. Of K the same number of comparisons: one with K candidates
        has K-1 pairs, and costs more.""")
    yield _settings_table(pretrained, "candidates", lambda g: str(g["candidates"]), "K")
    yield "Fewer steps over the same prompts, each with a whole schedule of its own:"
    yield _settings_table(pretrained, "data", lambda g: f"{g['share']:g}", "share of the steps")


def _scaling(figures: dict) -> Iterator[str]:
    yield "## Scaling"
    if figures["scaling"] is None:
        yield NOT_MEASURED
        return
    found, paper, bare = figures["scaling"], figures["scaling"]["paper"], figures["scaling"]["without_embedding"]
    low, high = found["ci95"]
    yield "![loss over parameters](study/scaling.svg)"
    yield _paragraph(f"""L(N) = a N^-α with a = {found["coefficient"]:.3f} and the exponent α = {found["exponent"]:.4f}
        (95 % {low:.4f} to {high:.4f}, Student's t over the means of the sizes, whose seeds share a base model), R²
        {found["r2"]:.3f}, {found["num_runs"]} runs of {len(found["sizes"])} sizes. The loss falls with size where α is
        positive. The paper's: a = {paper["coefficient"]}, α = {paper["exponent"]}, R² {paper["r2"]}, five sizes of 50M
        to 1B.""")
    yield _paragraph(f"""{found["convention"]}. Without the embedding the exponent is {bare["exponent"]:.4f}
        ({bare["ci95"][0]:.4f} to {bare["ci95"][1]:.4f}), R² {bare["r2"]:.3f}. L is the loss on new prompts of seen
        policies; one that knows nothing has 0.693.
        All sizes saw the same comparisons and base models the same tokens: data
        are fixed, not plentiful as in the paper. Levels cannot be compared, since other policies are harder or
        easier to tell apart.""")


def _finetune(figures: dict) -> Iterator[str]:
    settings = figures["settings"]
    yield "## Fine-tuning"
    if all(figures["finetune"].values()):
        yield "![accuracy of the arms](study/finetune.svg)"
    yield _paragraph(f"""{settings["finetune_seeds"]} seeds. On GSM8K they hold out the
        {settings["gsm8k_folds"]} folds of the problems in turn, so that all of them are judged by models that did not
        see them;
        of solutions there are the endings alone, without the calculator's annotations. No answer is its own reference.
        On AlpacaEval the better answer mostly is the longer one; answers are cut, which hides a part of that.
        One arm gives the base model about as many tokens more as pre-training reads, in the way of a language model,
        so that what is due to the method can be told from what is due to longer training on the same text.""")
    for task, found in figures["finetune"].items():
        if found is None:
            yield f"{TASK_TITLES[task]}: {NOT_MEASURED[0].lower()}{NOT_MEASURED[1:]}"
            continue
        rows = []
        for arm, title in ARM_TITLES.items():
            one = found[arm]
            each = ", ".join(f"{mean:.3f}" for mean in one["each_seed"])
            rows.append([title, interval(one), each, f"{one['num_prompts']:,}", f"{one['num_pairs']:,}"])
        rows.append(["more words shared with the reference", f"{found['word_overlap']:.3f}", "", "", ""])
        rows.append(["the longer one", f"{found['longer']:.3f}", "", "", ""])
        yield _table((TASK_TITLES[task], "accuracy", "each seed", "prompts", "pairs"), rows, numbers=(3, 4))
        told = [
            f"{name.replace('_', ' ')} {interval(one, sign=True)}"
            + (f", each seed {', '.join(f'{each:+.3f}' for each in one['each_seed'])}")
            for name, one in found["differences"].items()
        ]
        yield _paragraph(f"On the same pairs: {'; '.join(told)}.")
        yield from _after_pretraining(figures, found)


def _after_pretraining(figures: dict, found: dict) -> Iterator[str]:
    """Whether seeds that came further in pre-training do so here."""
    main = figures["pretraining"]["settings"].get(figures["pretraining"]["claims"]["main"])
    before, after = (one["each_seed"] if one else [] for one in (main and main["seen"], found["pretrained_reference"]))
    if len(before) == len(after) > 2 and len(set(before)) > 1 and len(set(after)) > 1:
        yield _paragraph(f"""How far a seed's pre-training came on new prompts of seen policies and how far it comes
            here correlate with r = {correlation(before, after):.2f} over {len(after)} seeds.""")


def _zero_shot(figures: dict) -> Iterator[str]:
    yield "## Zero-shot: the pre-trained model as it is"
    rows = []
    for name, found in figures["zero_shot"].items():
        if found is None:
            rows.append([name, "not measured", "", "", "", ""])
            continue
        each = ", ".join(f"{one:.3f}" for one in found["each_seed"])
        learnt_nothing = [f"{found[baseline]:.3f}" for baseline in ("word_overlap", "longer")]
        rows.append([name, interval(found), each, *learnt_nothing, f"{found['num_prompts']:,}"])
    head = ("set", "accuracy", "each seed", "more words shared", "the longer one", "prompts")
    yield _table(head, rows, numbers=(3, 4, 5))
    tokens = figures["settings"]["max_response_length"]
    yield _paragraph(f"""Answers are cut to {tokens} tokens, as in pre-training. Every problem of GSM8K counts once
        here; above, folds count as often as seeds hold them out, so what needs no training differs a little.""")


def _failures(figures: dict) -> Iterator[str]:
    yield "## What did not work, and what is not clear"
    found = list(shortcomings(figures)) or ["Every claim that was tested holds by its interval."]
    yield "\n".join(_paragraph(f"- {line}").replace("\n", "\n  ") for line in found)


def _repeat(figures: dict) -> Iterator[str]:
    digest = hashlib.sha256("".join(f"{k} {v}\n" for k, v in figures["data"].items()).encode()).hexdigest()
    yield "## Again"
    runs = f" RUNS={len(figures['rft']['runs'])}" if figures["rft"] else ""
    told = (
        f"make study-rft{runs:17} # first: the part on reinforcement fine-tuning, an hour or two",
        "make study DATA=folder          # hours",
        "make study SIZE=smoke           # minutes, on text of its own",
    )
    yield "\n".join(["```", *told, "```"])
    yield _paragraph("""`examples/study/prepare_data.py --help` says how clones of three public repositories become
        that folder. It divides AlpacaEval's prompts anew, so that figures differ from these by that, too. The command
        goes on where it was stopped; with `--list` behind `--data folder` or `--size smoke`
        `examples/study/run.py` prints what it would run.""")
    public = "tatsu-lab/alpaca_eval, openai/grade-school-math and Zhou-Zoey/RMB-Reward-Model-Benchmark"
    files = f"{len(figures['data'])} {'generated files' if figures['generated'] else f'public files of {public}'}"
    yield _paragraph(f"""{files}, each with its SHA-256 in [study.json](study.json). The SHA-256 of that
        list (`name hash` and a newline for each) is `{digest}`.""")
    yield f"Jobs by commit: {', '.join(f'{commit} ({count})' for commit, count in figures['commits'].items())}."
    spent = ", ".join(f"{stage} {found / 60:.1f}" for stage, found in figures["seconds"].items())
    yield f"Minutes of jobs: {spent}. One command of each kind:"
    shown = [figures["commands"][name] for name in _examples(figures["commands"])]
    yield "\n".join(["```", *shown, "```"])


def _examples(commands: dict[str, str]) -> list[str]:
    kinds = ("inputs", "sampled-", "tokenizer", "datasets-", "base-text", "base-", "start-", "pretrain/", "evaluate/")
    kinds += ("finetune/",)
    found: list[str] = []
    for kind in kinds:
        found += [name for name in commands if name.startswith(kind) and name not in found][:1]
    return found
