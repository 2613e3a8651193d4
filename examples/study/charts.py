"""The study's figures, as small SVG files that are the same for the same numbers."""

from pathlib import Path

import numpy as np

BASE_COLOUR, RANDOM_COLOUR, GREY = "#1f5fa8", "#c2571a", "#777777"
ARM_COLOURS = ("#1f5fa8", "#4f9d8f", "#6aa1d8", "#b9b9b9")


def draw(figures: dict, directory: Path) -> list[str]:
    """Draw every figure into `directory`; returns their names."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update(
        {"svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    )
    matplotlib.rcParams.update({"axes.spines.right": False, "figure.constrained_layout.use": True})
    directory.mkdir(parents=True, exist_ok=True)
    plots = {"start": _start, "ablations": _ablations} if figures["pretraining"]["settings"] else {}
    plots |= {"scaling": _scaling} if figures["scaling"] else {}
    plots |= {"finetune": _finetune} if all(figures["finetune"].values()) else {}
    for name, plot in plots.items():
        figure = plot(figures, plt)
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
    return list(plots)


def _start(figures: dict, plt):
    """Held-out accuracy over steps, and at the end over sizes, from base and from random weights."""
    pretrained = figures["pretraining"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
    titles = {"all": "from the base model", "base": "the same, fewer steps", "random": "from random weights"}
    for name, colour in (("all", BASE_COLOUR), ("base", ARM_COLOURS[2]), ("random", RANDOM_COLOUR)):
        if name == "base" and pretrained["claims"]["base"] == pretrained["claims"]["main"]:
            continue
        for seed, curve in enumerate(pretrained["curves"][name]):
            label = None if seed else titles[name]
            left.plot(*zip(*curve, strict=True), color=colour, marker="o", markersize=2, linewidth=1, label=label)
    for start, colour in (("base", BASE_COLOUR), ("random", RANDOM_COLOUR)):
        groups = [pretrained["settings"][key] for key in pretrained["tables"]["start"] if f"/{start}/" in key]
        for name, style in (("seen", "-"), ("unseen", "--")):
            _errors(
                right,
                [g["parameters"]["all"] for g in groups],
                [g[name] for g in groups],
                colour,
                style,
                f"{start}, {name}",
            )
    left.set(xlabel="steps", ylabel="held-out accuracy", title="main size, every seed, while training")
    right.set(xlabel="parameters", xscale="log", title="at the end, by size")
    _mark(right, [g["parameters"]["all"] for g in pretrained["settings"].values()])
    for axes in (left, right):
        axes.axhline(0.5, color=GREY, linewidth=0.8)
        axes.legend(frameon=False, fontsize=7)
    return figure


def _mark(axes, values) -> None:
    """Ticks of a logarithmic axis at these values, in thousands or millions, and nowhere else."""
    shown = sorted(set(values))
    axes.set_xticks(shown, [f"{v / 1e6:.3g}M" if v >= 1e6 else f"{v / 1e3:.3g}k" for v in shown])
    axes.minorticks_off()


def _errors(axes, x, found, colour, style, label) -> None:
    """Means with their intervals."""
    means = np.array([one["mean"] for one in found])
    low, high = (np.array([one["ci95"][i] for one in found]) for i in (0, 1))
    # A bootstrap's interval may lie beside its mean where there are very few prompts.
    spread = np.maximum([means - low, high - means], 0)
    axes.errorbar(
        x, means, yerr=spread, color=colour, linestyle=style, marker="o", markersize=3, capsize=2, label=label
    )


def _ablations(figures: dict, plt):
    """Accuracy against K and against the amount of data."""
    pretrained = figures["pretraining"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
    for axes, table, key in ((left, "candidates", "candidates"), (right, "data", "comparisons")):
        groups = [pretrained["settings"][name] for name in pretrained["tables"][table]]
        for name, style in (("seen", "-"), ("unseen", "--")):
            _errors(axes, [g[key] for g in groups], [g[name] for g in groups], BASE_COLOUR, style, f"{name} policies")
        axes.legend(frameon=False, fontsize=7)
    counts = [pretrained["settings"][name]["candidates"] for name in pretrained["tables"]["candidates"]]
    left.set(xlabel="K, candidates a comparison", ylabel="held-out accuracy", xticks=counts)
    right.set(xlabel="comparisons trained on", xscale="log")
    _mark(right, [pretrained["settings"][name]["comparisons"] for name in pretrained["tables"]["data"]])
    return figure


def _scaling(figures: dict, plt):
    """Held-out loss over parameters with the fit; beside it the paper's law, as far as that was fitted."""
    scaling, paper = figures["scaling"], figures["scaling"]["paper"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
    sizes = np.array(scaling["sizes"], dtype=float)
    line, far = np.geomspace(sizes.min(), sizes.max(), 50), np.geomspace(5e7, 1e9, 50)
    fitted = f"here: exponent {scaling['exponent']:.4f}, R² {scaling['r2']:.3f}"
    theirs = f"paper: exponent {paper['exponent']}, R² {paper['r2']}"
    for axes in (left, right):
        for place, losses in enumerate(scaling["losses"]):
            axes.plot([sizes[place]] * len(losses), losses, "o", color=BASE_COLOUR, markersize=3)
        axes.plot(line, scaling["coefficient"] * line ** -scaling["exponent"], color=BASE_COLOUR, label=fitted)
        axes.set(xscale="log", xlabel="parameters, embedding included")
    right.plot(far, paper["coefficient"] * far ** -paper["exponent"], color=RANDOM_COLOUR, label=theirs)
    right.legend(frameon=False, fontsize=7)
    left.set_ylabel("held-out Bradley-Terry loss")
    _mark(left, sizes)
    return figure


def _finetune(figures: dict, plt):
    """Held-out accuracy of every arm on both tasks, and the two baselines that learn nothing."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.6), sharey=True)
    for one, (task, found) in zip(axes, figures["finetune"].items(), strict=True):
        arms = [name for name in found if isinstance(found[name], dict) and "num_pairs" in found[name]]
        for place, (arm, colour) in enumerate(zip(arms, ARM_COLOURS, strict=True)):
            mean, (low, high) = found[arm]["mean"], found[arm]["ci95"]
            one.bar(place, mean, color=colour, yerr=[[max(0, mean - low)], [max(0, high - mean)]], capsize=3)
        for name, style in (("word_overlap", "--"), ("longer", ":")):
            one.axhline(found[name], color=GREY, linestyle=style, linewidth=1, label=name.replace("_", " "))
        one.set_xticks(range(len(arms)), [arm.replace("_", "\n") for arm in arms])
        one.set(title=task, ylim=(0.4, 1.0))
        one.legend(frameon=False, fontsize=7)
    axes[0].set_ylabel("held-out accuracy")
    return figure
