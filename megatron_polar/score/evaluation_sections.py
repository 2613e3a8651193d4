"""Sections of an evaluation's page from its `summary.json`: the publishers' scores, policies, calibration and length.

A summary of an older version lacks some of these entries; then the sections are not there.
"""

import html
from typing import Any

from megatron_polar.data.public.rm_bench import STYLES
from megatron_polar.score.figures import interval_figure, reliability_figure
from megatron_polar.score.page import HeatMap, Section, cards, heat_map, share, table

_Summary = dict[str, Any]


def references_text(summary: _Summary) -> str:
    """A paragraph that says what the candidates were compared with, and how many of them were the reference itself."""
    if "reference_scheme" not in summary:
        return ""
    text = f"Reference: {summary['reference_scheme']} ({summary['reference_scheme_meaning']}). "
    free = summary["free_wins"]
    if free["num_candidates"]:
        text += (
            f"{free['num_candidates']:,} candidates are the reference's own text, so that {free['num_pairs']:,} pairs "
            f"are decided by that: without these the accuracy is {share(free['without']['accuracy'])} "
            f"({share(free['without']['low'])} to {share(free['without']['high'])})."
        )
    else:
        text += "No candidate is the reference's own text."
    return f"<p>{html.escape(text)}</p>\n"


def further_sections(summary: _Summary, *, prefix: str = "") -> list[Section]:
    """The sections that the summary has entries for, their headings after `prefix`."""
    builders = {
        "published": ("As its publishers score it", _published),
        "policy_pairs": ("Policies", _policies),
        "calibration": ("Calibration", _calibration),
        "length_bias": ("Length", _length),
    }
    return [
        Section(prefix + (heading if not prefix else heading[0].lower() + heading[1:]), build(summary[key]))
        for key, (heading, build) in builders.items()
        if summary.get(key) is not None
    ]


def _published(entry: _Summary) -> str:
    rows = [
        (name, *(score[key] for key in ("score", "low", "high", "num_items")))
        for name, score in entry["scores"].items()
    ]
    headers = ("score", "value", "95 % from", "to", "items")
    body = table(headers, rows, caption=entry["protocol"], write_number=share)
    if entry["matrix"] is not None:
        shares = entry["matrix"]
        counts = [[rows[-1][4]] * len(STYLES)] * len(STYLES)
        styles = HeatMap(
            rows=[f"chosen {style}" for style in STYLES],
            columns=[f"rejected {style}" for style in STYLES],
            shares=shares,
            counts=counts,
            totals={},
        )
        body += heat_map(
            styles, caption="Percent of prompts won, all domains. Diagonal: normal; above it: hard; below it: easy."
        )
    return body


def _policies(entry: _Summary) -> str:
    names, accuracies = entry["policies"], entry["by_reference"]
    order = sorted(range(len(names)), key=lambda i: (-(accuracies[names[i]]["accuracy"] or 0.0), names[i]))
    ordered = [names[index] for index in order]
    contrasts = entry["by_contrast"]
    map_of_pairs = HeatMap(
        rows=[*ordered, "all references"],
        columns=ordered,
        shares=[
            *([entry["accuracy"][i][j] for j in order] for i in order),
            [contrasts[name]["accuracy"] for name in ordered],
        ],
        counts=[
            *([entry["num_pairs"][i][j] for j in order] for i in order),
            [contrasts[name]["num_pairs"] for name in ordered],
        ],
        totals={
            "all contrasts": [*(accuracies[name]["accuracy"] for name in ordered), None],
            "AUC": [*(entry["auc"].get(name, {}).get("auc") for name in ordered), entry["macro_auc"]["auc"]],
        },
    )
    caption = (
        "Accuracy in percent; the number of pairs is below it, or shown when pointed at where there are many policies. "
        "Rows: the policy of the reference and of the better candidate; columns: that of the worse one; both from "
        "easy to hard references. The AUC at the foot is the mean over the policies."
    )
    macro, pooled = entry["macro_auc"], entry["pooled_auc"]
    figures = {
        f"AUC, mean over the references' policies{_between(macro)}": macro["auc"],
        f"AUC, all rewards together{_between(pooled)}": pooled["auc"],
        "policies": len(names),
    }
    areas = [(name, entry["auc"].get(name)) for name in ordered]
    rows = [(name, area["auc"], area["low"], area["high"]) for name, area in areas if area and area["low"] is not None]
    drawn = (
        interval_figure(
            rows,
            title="AUC by the policy of the reference",
            caption="Same-policy against other-policy rewards, all prompts.",
        )
        if rows
        else ""
    )
    return f'{cards(figures)}{heat_map(map_of_pairs, caption=caption)}<div class="figures">{drawn}</div>\n'


def _calibration(entry: _Summary) -> str:
    figures = {
        f"expected calibration error{_between(entry, 'ece_')}": entry["ece"],
        f"Brier score{_between(entry, 'brier_')}; 0.25 is chance": entry["brier"],
        "log loss; 0.693 is chance": entry["log_loss"],
        "mean confidence": entry["mean_confidence"],
    }
    bins = entry["bins"]
    points = [
        (one["confidence"], one["accuracy"], one["accuracy_low"], one["accuracy_high"])
        for one in bins
        if one["num_pairs"]
    ]
    caption = "Below the line the rewards are too sure of themselves. 10 bins of equal width; bars: 95 % intervals."
    drawn = reliability_figure(points, title="Reliability of the probabilities", caption=caption)
    rows = [
        (f"{one['low']:.2f} to {one['high']:.2f}", one["num_pairs"], one["confidence"], one["accuracy"]) for one in bins
    ]
    bins_table = table(
        ("confidence", "pairs", "mean confidence", "share right"), rows, caption="The bins.", write_number=share
    )
    return f'{cards(figures)}<div class="figures">{drawn}<div>{bins_table}{_fit(entry["fit"])}</div></div>\n'


def _fit(fit: _Summary) -> str:
    if fit["temperature"] is None:
        return f"<p>No temperature was fitted: {html.escape(fit['reason'])}.</p>\n"
    rows = [
        (name, fit[f"{key}_before"], fit[f"{key}_after"])
        for name, key in (("log loss", "log_loss"), ("Brier score", "brier"), ("calibration error", "ece"))
    ]
    caption = (
        f"Temperature {fit['temperature']:.4g}, fitted on {fit['num_fit_pairs']:,} pairs and measured on the "
        f"{fit['num_test_pairs']:,} pairs of the other prompts."
    )
    return table(
        ("on the other half", "as they are", "with the temperature"), rows, caption=caption, write_number=share
    )


def _length(entry: _Summary) -> str:
    correlations = {
        "rewards and length": entry["reward_and_length"],
        "the known order and length": entry["quality_and_length"],
    }
    rows = [
        (name, *(found[key] for key in ("correlation", "low", "high", "num_items")))
        for name, found in correlations.items()
    ]
    caption = (
        "Spearman's correlation within an item, mean over items. The first far above the second is a bias to length."
    )
    body = table(("correlation of", "mean", "95 % from", "to", "items"), rows, caption=caption, write_number=share)
    accuracies = {
        "better answer is longer": entry["better_is_longer"],
        "better answer is shorter": entry["better_is_shorter"],
        "baseline: prefer the longer": entry["prefer_longer"],
        "baseline: words of the reference": entry["prefer_word_overlap"],
    }
    drawn = [
        (name, found["accuracy"], found["low"], found["high"])
        for name, found in accuracies.items()
        if found is not None and found["accuracy"] is not None
    ]
    caption = "The rewards where length helps and where it misleads, and two scorers that learnt nothing."
    figure = interval_figure(drawn, title="Accuracy and length", caption=caption) if drawn else ""
    return f'{body}<div class="figures">{figure}</div>\n'


def _between(entry: _Summary, key: str = "") -> str:
    """The interval of a figure, to stand behind its name."""
    low, high = entry[f"{key}low"], entry[f"{key}high"]
    return "" if low is None else f" (95 % {low:.3f} to {high:.3f})"
