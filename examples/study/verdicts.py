"""The study in a table: every claim, whether the figures bear it out, and the figures. Intervals decide alone.

Two of them: over prompts, and over seeds. A claim that the first bears out and the second does not holds for the models
that were trained, and another training may say otherwise.
"""

from collections.abc import Iterator

from scipy import stats
from shortcomings import TASK_TITLES, interval

Verdict = tuple[str, str, str]
"""A claim, one of the four words below, perhaps with one of the two restrictions, and the figures."""
HOLDS, UNCLEAR, REFUTED, NOT_MEASURED = "yes", "not clear", "no, the reverse", "not measured"
FINE_TUNING = {
    "pretrained_reference - reference_only": "pre-training helps",
    "pretrained_reference - reference_longer_base": "pre-training helps more than language modelling for as long",
    "reference_only - neither": "a reference helps",
}
"""Differences of arms, and what they bear out."""
THESE_SEEDS, ONE_SEED = ", for these seeds", ", for one seed"


def verdicts(figures: dict) -> Iterator[Verdict]:
    """All claims in the order of the page."""
    settings, tables = figures["pretraining"]["settings"], figures["pretraining"]["tables"]
    claims = figures["pretraining"]["claims"]
    main, base, random = (settings.get(claims[name]) for name in ("main", "base", "random"))
    for name in ("seen", "unseen"):
        yield _above_chance(f"Pre-training learns to match {name} policies on new prompts", main and main[name])
    for name in ("seen", "unseen"):
        claim = f"It does so better than counting shared words ({name} policies)"
        yield _beats_words(claim, main and main[name], main and main[name])
    for name in ("seen", "unseen"):
        claim = f"A base model is a better start than random weights ({name} policies)"
        yield _apart(claim, base and base[name], random and random[name])
    for table, claim, key in (
        ("data", "More steps over the same prompts help", "comparisons"),
        ("candidates", "More candidates a comparison help", "candidates"),
    ):
        groups = [settings[setting] for setting in tables[table]]
        few, many = (groups[0], groups[-1]) if len(groups) > 1 else (None, None)
        told = f", {many[key]:,} against {few[key]:,} {key}" if many else ""
        yield _apart(f"{claim} (seen policies{told})", many and many["seen"], few and few["seen"])
    yield _law(figures["scaling"])
    for task, found in figures["finetune"].items():
        for pair, words in FINE_TUNING.items():
            yield _difference(f"{TASK_TITLES[task]}: {words}", found and found["differences"][pair])
        best = found and found["pretrained_reference"]
        claim = f"{TASK_TITLES[task]}: better than counting shared words"
        yield _beats_words(claim, best, found)
    for name, found in figures["zero_shot"].items():
        yield _above_chance(f"Zero-shot on {name}, better than chance", found)


def _above_chance(claim: str, found: dict | None) -> Verdict:
    if not found:
        return claim, NOT_MEASURED, ""
    return claim, _restricted(_word(found["ci95"], 0.5), found["ci95_seeds"], 0.5), _told(found)


def _beats_words(claim: str, found: dict | None, beside: dict | None) -> Verdict:
    """An accuracy against that of counting shared words, by their difference on the same pairs."""
    if not found:
        return claim, NOT_MEASURED, ""
    claim, word, told = _difference(claim, beside["over"]["word_overlap"])
    return claim, word, f"{found['mean']:.3f}, it has {beside['word_overlap']:.3f}; difference {told}"


def _apart(claim: str, better: dict | None, worse: dict | None) -> Verdict:
    """By intervals that do not overlap, which asks for more than a difference that is not zero; seeds by Welch's t."""
    if not better or not worse:
        return claim, NOT_MEASURED, ""
    told = f"{interval(better)} against {interval(worse)}"
    word = HOLDS if better["ci95"][0] > worse["ci95"][1] else UNCLEAR
    word = REFUTED if better["ci95"][1] < worse["ci95"][0] else word
    span = None
    if min(len(better["each_seed"]), len(worse["each_seed"])) > 1:
        test = stats.ttest_ind(better["each_seed"], worse["each_seed"], equal_var=False)
        span = list(map(float, test.confidence_interval(0.95)))
        told += f"; difference over seeds {span[0]:+.3f} to {span[1]:+.3f}"
    return claim, _restricted(word, span, 0), told


def _difference(claim: str, found: dict | None) -> Verdict:
    if not found:
        return claim, NOT_MEASURED, ""
    return claim, _restricted(_word(found["ci95"], 0), found["ci95_seeds"], 0), _told(found, sign=True)


def _restricted(word: str, over_seeds: list[float] | None, line: float) -> str:
    """A word that intervals over prompts have given, as far as seeds bear it out."""
    if word == UNCLEAR:
        return word
    if over_seeds is None:
        return word + ONE_SEED
    return word if _word(over_seeds, line) == word else word + THESE_SEEDS


def _told(found: dict, *, sign: bool = False) -> str:
    if found["ci95_seeds"] is None:
        return interval(found, sign=sign)
    low, high = found["ci95_seeds"]
    form = "+.3f" if sign else ".3f"
    return f"{interval(found, sign=sign)}; over seeds {low:{form}} to {high:{form}}"


def _law(found: dict | None) -> Verdict:
    claim = "Held-out loss falls with size"
    if found is None:
        return claim, NOT_MEASURED, ""
    low, high = found["ci95"]
    told = f"exponent {found['exponent']:.4f} ({low:.4f} to {high:.4f}), R² {found['r2']:.3f}"
    return claim, _word(found["ci95"], 0), told


def _word(span: list[float], line: float) -> str:
    """Where an interval lies to a line."""
    if span[0] > line:
        return HOLDS
    return REFUTED if span[1] < line else UNCLEAR
