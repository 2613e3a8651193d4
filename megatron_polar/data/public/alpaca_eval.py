"""AlpacaEval: several policies' answers to the same instructions, and annotations that order them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

from megatron_polar.data.public.files import Record, draw, json_rows, preference_record, text_of
from megatron_polar.errors import UserError

# The publishers' own spelling of the GPT-4-turbo annotations that AlpacaEval 2 ranks by.
ALPACA_EVAL_ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
_ALPACA_EVAL_TIE = 1.5  # `preference` runs from 1 (the baseline is better) to 2 (the policy is better)


def alpaca_eval_trajectories(
    result_directories: Sequence[Path], *, allow_single: bool = False, skipped: Counter[str]
) -> Iterator[Record]:
    """Merge `results/` directories of several sampling runs into trajectory groups, one per instruction.

    A directory holds `<policy>/model_outputs.json`; a policy is its directory's name, the same in every run.
    AlpacaEval publishes one answer per policy and instruction, so one run alone has no same-policy pair: POLAR needs a
    second run of at least some policies. `allow_single` yields the groups all the same, for joining with further
    samples later on. Repeats of the same text by the same policy are dropped: as reference and candidate they would be
    a free win.
    """
    prompts: dict[str, list[dict[str, str]]] = {}
    datasets: dict[str, str] = {}
    for directory in result_directories:
        for policy, path in _policy_files(directory, "model_outputs.json"):
            for where, row in json_rows(path):
                prompt = _alpaca_eval_prompt(row, where=where)
                trajectory = {"policy": policy, "text": text_of(row, "output", where=where)}
                trajectories = prompts.setdefault(prompt, [])
                datasets.setdefault(prompt, str(row.get("dataset", "alpaca_eval")))
                if trajectory in trajectories:
                    skipped["trajectory repeated by its own policy"] += 1
                else:
                    trajectories.append(trajectory)
    usable = 0
    for prompt, trajectories in prompts.items():
        per_policy = Counter(trajectory["policy"] for trajectory in trajectories)
        if not allow_single and (len(per_policy) < 2 or max(per_policy.values()) < 2):
            skipped["instruction without a same-policy pair and another policy"] += 1
            continue
        usable += 1
        yield {"prompt": prompt, "trajectories": trajectories, "meta": {"dataset": datasets[prompt]}}
    if not usable:
        raise UserError(
            f"{', '.join(map(str, result_directories))}: no policy answers an instruction twice, and POLAR compares "
            "two samples of one policy; give --results once per sampling run, or --allow-single to join samples later"
        )


def alpaca_eval_preferences(
    results: Path,
    *,
    annotator: str = ALPACA_EVAL_ANNOTATOR,
    reference_policy: str | None = None,
    min_margin: float = 0.3,
    pairs_per_prompt: int = 1,
    seed: int = 0,
    skipped: Counter[str],
) -> Iterator[Record]:
    """Turn the published annotations into preferences: of two answers to an instruction, the annotator liked one more.

    Reads `<policy>/<annotator>/annotations.json`. Each annotation is a policy against the same baseline, so two
    policies are ordered by how strongly each is preferred to the baseline (1..2; the baseline itself is at 1.5); pairs
    closer than `min_margin` are left out. The reference is the answer of `reference_policy`, or the best-liked answer
    of the instruction, which is POLAR's protocol; it is never one of the pair.
    """
    files = list(_policy_files(results, f"{annotator}/annotations.json"))
    prompts: dict[str, dict[str, tuple[float, str]]] = {}  # instruction -> policy -> (preference, answer)
    baseline = None
    for policy, path in files:
        for where, row in json_rows(path):
            prompt = _alpaca_eval_prompt(row, where=where)
            preference = row.get("preference")
            if type(preference) not in (int, float) or not (preference == 0 or 1 <= preference <= 2):
                skipped["annotation without a preference"] += 1
                continue
            if baseline is None:
                baseline = row.get("generator_1")
            if row.get("generator_1") != baseline:
                raise UserError(
                    f"{where}: generator_1 is {row.get('generator_1')!r}, but earlier files were annotated against "
                    f"{baseline!r}; preferences against different baselines cannot be compared, import them separately"
                )
            answers = prompts.setdefault(prompt, {})
            answers[str(baseline)] = (_ALPACA_EVAL_TIE, text_of(row, "output_1", where=where))
            # 0 is how older files write a draw, and how AlpacaEval's own metrics read it.
            answers[policy] = (float(preference or _ALPACA_EVAL_TIE), text_of(row, "output_2", where=where))
    if reference_policy is not None and not any(reference_policy in answers for answers in prompts.values()):
        known = sorted({policy for answers in prompts.values() for policy in answers})
        raise UserError(f"{results}: no annotations of --reference-policy {reference_policy!r}; there are {known}")
    for prompt, answers in prompts.items():
        reference = reference_policy or max(answers, key=lambda policy: (answers[policy][0], policy))
        if reference not in answers:
            skipped["instruction without an answer of the reference policy"] += 1
            continue
        others = sorted((value, policy) for policy, (value, _) in answers.items() if policy != reference)
        pairs = [(b, w) for (low, w), (high, b) in combinations(others, 2) if high - low >= min_margin]
        pairs = [pair for pair in pairs if len({answers[policy][1] for policy in (reference, *pair)}) == 3]
        if not pairs:
            skipped["instruction without a pair of the margin asked for"] += 1
        for better, worse in draw(pairs, pairs_per_prompt, seed=seed, text=prompt):
            margin = round(answers[better][0] - answers[worse][0], 6)
            policies = {"reference_policy": reference, "chosen_policy": better, "rejected_policy": worse}
            texts = (answers[policy][1] for policy in (reference, better, worse))
            yield preference_record(prompt, *texts, meta=policies | {"margin": margin})


def _alpaca_eval_prompt(row: Record, *, where: str) -> str:
    instruction = text_of(row, "instruction", where=where)
    return f"{instruction}\n\n{row['input']}" if row.get("input") else instruction


def _policy_files(directory: Path, name: str) -> list[tuple[str, Path]]:
    """Find `<policy>/<name>` under a results directory, in order of the policies' names."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give a `results` directory of the alpaca_eval repository")
    files = [(folder.name, folder / name) for folder in sorted(directory.iterdir()) if (folder / name).is_file()]
    if not files:
        raise UserError(
            f"{directory}: no <policy>/{name} in it; give a `results` directory of the alpaca_eval repository"
        )
    return files
