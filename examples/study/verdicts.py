"""The study in a table: every claim, whether the figures bear it out, and the figures. Intervals decide alone."""

from collections.abc import Iterator

from shortcomings import TASK_TITLES, interval

Verdict = tuple[str, str, str]
"""A claim, one of the four words below, and the figures."""
HOLDS, UNCLEAR, REFUTED, NOT_MEASURED = "yes", "not clear", "no, the reverse", "not measured"


def verdicts(figures: dict) -> Iterator[Verdict]:
    """All claims in the order of the page."""
    settings, tables = figures["pretraining"]["settings"], figures["pretraining"]["tables"]
    main = figures["pretraining"]["main"]
    base, random = (settings.get(main.get(start)) for start in ("base", "random"))
    for name in ("seen", "unseen"):
        yield _above_chance(f"Pre-training learns to match {name} policies on new prompts", base and base[name])
    for name in ("seen", "unseen"):
        claim = f"A base model is a better start than random weights ({name} policies)"
        yield _apart(claim, base and base[name], random and random[name])
    for table, claim in (("data", "More comparisons help"), ("candidates", "More candidates a comparison help")):
        groups = [settings[key]["seen"] for key in tables[table]]
        yield _apart(f"{claim} (seen policies)", *((groups[-1], groups[0]) if len(groups) > 1 else (None, None)))
    yield _law(figures["scaling"])
    for task, found in figures["finetune"].items():
        for pair, words in (
            ("pretrained_reference - reference_only", "pre-training helps"),
            ("reference_only - neither", "a reference helps"),
        ):
            yield _difference(f"{TASK_TITLES[task]}: {words}", found and found["differences"][pair])
    for name, found in figures["zero_shot"].items():
        yield _above_chance(f"Zero-shot on {name}, better than chance", found)


def _above_chance(claim: str, found: dict | None) -> Verdict:
    if not found:
        return claim, NOT_MEASURED, ""
    return claim, _word(found["ci95"], 0.5), interval(found)


def _apart(claim: str, better: dict | None, worse: dict | None) -> Verdict:
    """By intervals that do not overlap, which asks for more than a difference that is not zero."""
    if not better or not worse:
        return claim, NOT_MEASURED, ""
    told = f"{interval(better)} against {interval(worse)}"
    if better["ci95"][0] > worse["ci95"][1]:
        return claim, HOLDS, told
    return claim, REFUTED if better["ci95"][1] < worse["ci95"][0] else UNCLEAR, told


def _difference(claim: str, found: dict | None) -> Verdict:
    return (claim, _word(found["ci95"], 0), interval(found, sign=True)) if found else (claim, NOT_MEASURED, "")


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
