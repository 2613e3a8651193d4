"""What the study's figures do not bear out, in plain words: each claim is tested by its interval."""

from collections.abc import Iterator

TASK_TITLES = {"gsm8k": "GSM8K solutions", "alpaca_eval": "AlpacaEval preferences"}
_STRAIGHT = 0.95  # R² below which a law is called rough


def shortcomings(figures: dict) -> Iterator[str]:
    """A sentence with its figures for every claim that does not clearly hold."""
    yield from _pretraining(figures)
    if figures["scaling"]:
        yield from _scaling(figures["scaling"])
    for task, found in figures["finetune"].items():
        if found:
            yield from _finetuning(TASK_TITLES[task], found)
    for name, found in figures["zero_shot"].items():
        if not found:
            continue
        if found["ci95"][0] <= 0.5:
            yield f"Zero-shot on {name} the pre-trained model is {_at_chance(found)}: {interval(found)}."
        for baseline in _better_baselines(found, found):
            yield f"Zero-shot on {name} the pre-trained model {baseline}."


def _at_chance(found: dict) -> str:
    return "clearly below chance" if found["ci95"][1] < 0.5 else "not clearly above chance"


def _pretraining(figures: dict) -> Iterator[str]:
    settings, claims = figures["pretraining"]["settings"], figures["pretraining"]["claims"]
    main, base, random = (settings.get(claims[name]) for name in ("main", "base", "random"))
    if main is None:
        return
    each, (low, high) = main["seen"]["each_seed"], main["seen"]["ci95"]
    if max(each) - min(each) > high - low:
        shown = ", ".join(f"{one:.3f}" for one in each)
        yield f"Seen policies: the main size's seeds are further apart ({shown}) than the interval over prompts says."
    for name in ("seen", "unseen"):
        if base and random and base[name]["ci95"][0] <= random[name]["ci95"][1]:
            both = f"{interval(base[name])} against {interval(random[name])}"
            yield f"{name.capitalize()} policies: a base model is no clearly better start than random weights ({both})."
    for name in ("seen", "unseen", "real"):
        for baseline in _better_baselines(main[name], main[name]):
            yield f"Set `{name}`: the pre-trained main size {baseline}."
    for name in ("seen", "unseen", "real"):
        if main[name]["ci95"][0] <= 0.5:
            yield f"Set `{name}`: the pre-trained main size is {_at_chance(main[name])} ({interval(main[name])})."
    found = [settings[key] for key in figures["pretraining"]["tables"]["candidates"]]
    first, last = (found[0], found[-1]) if found else (None, None)
    if first is not last and last["seen"]["ci95"][0] <= first["seen"]["ci95"][1]:
        both = f"{interval(last['seen'])} against {interval(first['seen'])}"
        yield f"K={last['candidates']} is not clearly better than K={first['candidates']} on seen policies ({both})."


def _scaling(found: dict) -> Iterator[str]:
    if found["ci95"][0] <= 0:
        span = f"{found['ci95'][0]:.4f} to {found['ci95'][1]:.4f}"
        between = [sum(losses) / len(losses) for losses in found["losses"]]
        seeds = max(max(losses) - min(losses) for losses in found["losses"])
        yield (
            f"The loss does not clearly fall with size: exponent {found['exponent']:.4f} ({span}). The seeds of one "
            f"size are up to {seeds:.3f} apart, the means of the sizes {max(between) - min(between):.3f}."
        )
    elif found["r2"] < _STRAIGHT:
        yield f"Losses lie on a power law only roughly: R² {found['r2']:.3f}."


def _finetuning(title: str, found: dict) -> Iterator[str]:
    for name, one in found["differences"].items():
        if one["ci95"][0] <= 0:
            verdict = "clearly worse" if one["ci95"][1] < 0 else "no clear gain"
            yield f"{title}: {name.replace('_', ' ')} is {interval(one, sign=True)}, {verdict}."
        elif one["ci95_seeds"] and one["ci95_seeds"][0] <= 0:
            low, high = one["ci95_seeds"]
            gain = f"{title}: {name.replace('_', ' ')} gains {interval(one, sign=True)}"
            yield f"{gain}, but over seeds {low:+.3f} to {high:+.3f}: another training may not."
    own = found["pretrained_reference"]
    gains = found["over"]["word_overlap"]["each_seed"]
    below = [mean for mean, gain in zip(own["each_seed"], gains, strict=True) if gain <= 0]
    if below and found["over"]["word_overlap"]["mean"] > 0:
        which = f"{len(below)} of {len(own['each_seed'])} seeds do not beat counting shared words"
        yield f"{title}: {which} ({', '.join(f'{mean:.3f}' for mean in below)}; it has {found['word_overlap']:.3f})."
    for baseline in _better_baselines(own, found):
        yield f"{title}: the pre-trained, fine-tuned model {baseline}."


def _better_baselines(own: dict, beside: dict) -> Iterator[str]:
    """What a model does not clearly beat, on the same pairs, of what learns nothing."""
    for name, words in (("word_overlap", "counting shared words"), ("longer", "taking the longer answer")):
        gain = beside["over"][name]
        if gain["ci95"][0] <= 0:
            verdict = "is clearly worse than" if gain["ci95"][1] < 0 else "does not clearly beat"
            figures = f"{own['mean']:.3f} against {beside[name]:.3f}; difference {interval(gain, sign=True)}"
            yield f"{verdict} {words} ({figures})"


def interval(found: dict, *, sign: bool = False) -> str:
    """A mean with its interval."""
    form = "+.3f" if sign else ".3f"
    return f"{found['mean']:{form}} ({found['ci95'][0]:{form}} to {found['ci95'][1]:{form}})"
