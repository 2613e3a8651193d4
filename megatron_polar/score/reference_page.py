"""The part of an evaluation's page that compares numbers of references."""

from typing import Any

from megatron_polar.score.figures import interval_line_figure
from megatron_polar.score.page import share, table


def references_body(found: dict[str, Any]) -> str:
    """HTML of `summary["references"]`: accuracy by number of references, and paired differences with intervals."""
    single = found["single"]
    rows: list[tuple] = [("1, mean of each alone", *(single[key] for key in ("accuracy", "low", "high")), None, None)]
    for entry in found["by_count"]:
        keys = ("accuracy", "low", "high", "mean_margin", "word_overlap_accuracy")
        rows.append(
            (
                "the first" if entry["references"] == 1 else f"the first {entry['references']}",
                *(entry[key] for key in keys),
            )
        )
    headers = ("references", "accuracy", "95 % from", "to", "mean margin", "word overlap alone")
    caption = "The same items throughout; a reward is the mean over the references."
    body = table(headers, rows, caption=caption, write_number=share)
    differences = []
    for entry in found["differences"]:
        name = f"{entry['references']} against {entry['against'] or 'the mean of each alone'}"
        differences.append((name, entry["difference"], entry["low"], entry["high"]))
    if differences:
        caption = "Paired over the same pairs; intervals by drawing prompts anew."
        body += table(
            ("numbers of references", "gain in accuracy", "95 % from", "to"),
            differences,
            caption=caption,
            write_number=share,
        )
    caption = f"With 95 % intervals. Single references disagree on {found['disagreement']:.1%} of the pairs."
    figures = interval_line_figure(
        [(entry["references"], entry["accuracy"], entry["low"], entry["high"]) for entry in found["by_count"]],
        title="Accuracy by number of references",
        x_label="references",
        y_label="accuracy",
        caption=caption,
    )
    gains = [entry for entry in found["differences"] if not entry["against"]]
    if gains:
        figures += interval_line_figure(
            [(entry["references"], entry["difference"], entry["low"], entry["high"]) for entry in gains],
            title="Gain over single references",
            x_label="references",
            y_label="difference of accuracies",
            caption="Against the mean accuracy of the references each alone, paired, with 95 % intervals.",
        )
    return f'{body}<div class="figures">{figures}</div>\n'
