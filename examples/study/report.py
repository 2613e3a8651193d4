"""Collect the study's figures: study.json, and study.md with its drawings, both from the runs alone.

report.py --run RUN --docs DIR [--partial]
"""

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from charts import draw
from figures import RFT, collect, commands
from jobs import Jobs
from omegaconf import OmegaConf
from page import write_page
from sizes import SIZES, Size
from stages import CONFIG, STAGES, Study

from megatron_polar.errors import UserError

PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "scipy", "sentencepiece")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--partial", action="store_true", help="of the jobs that are done; the rest is not measured")
    options = parser.parse_args(arguments)
    described = json.loads((options.run / "study.json").read_text())
    size = SIZES[described["size"]["name"]]
    study = Study(size, Path(described["data"]), options.run, options.docs, tuple(described["files"].items()))
    if options.partial:
        study = of_what_is_done(study, size)
    figures = {"size": size.name, "complete": not options.partial, **collect(study)}
    figures |= {
        "seconds": seconds(study, "seconds"),
        "cpu_seconds": seconds(study, "cpu_seconds"),
        "machine": machine(study),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "settings": size.describe() | {"warmup_fraction": warmup_fraction()},
        "data": described["files"],
        "generated": described.get("generated", False),
        "commits": commits(study),
        "commands": commands(study),
    }
    options.docs.mkdir(parents=True, exist_ok=True)
    (options.run / "report").mkdir(exist_ok=True)
    draw(figures, options.docs / "study")
    (options.docs / "study.json").write_text(json.dumps(rounded(figures), indent=1) + "\n")
    page = without_dead_links(write_page(figures, rft=rft_page(study)), options.docs)
    (options.docs / "study.md").write_text(page)
    print(f"{options.docs / 'study.md'}, study.json and study/*.svg are written", file=sys.stderr)
    return 0


def of_what_is_done(study: Study, size: Size) -> Study:
    """The same study, of which only what has been run counts. Raises UserError where no policies have spoken yet."""
    jobs = Jobs(study.run, study.jobs, parallel=size.parallel_jobs, forks=size.forks)
    done = frozenset(name for name in study.jobs if jobs.record_of(name))
    missing = [name for name, job in study.jobs.items() if job.stage == "policies" and name not in done]
    if missing:
        raise UserError(f"{study.run}: {missing[0]} is not done, so there is nothing to report; run --stages policies")
    return dataclasses.replace(study, done=done)


def rft_page(study: Study) -> str:
    """The tables of the study of reinforcement fine-tuning, its drawing moved to ours; empty where it was not run."""
    directory = study.run / RFT
    if not (directory / "rft.json").is_file():
        return ""
    shutil.copyfile(directory / "rft.svg", study.docs / "study" / "rft.svg")
    return f"![reward over the steps](study/rft.svg)\n\n{(directory / 'rft.md').read_text().strip()}"


def without_dead_links(page: str, docs: Path) -> str:
    """Links to other pages of the repository's docs as plain names, where the page is written elsewhere."""
    return re.sub(
        r"\[(\w+\.md)\]\(\1\)", lambda link: link[0] if (docs / link[1]).is_file() else f"docs/{link[1]}", page
    )


def seconds(study: Study, clock: str) -> dict[str, float]:
    """Seconds of every stage by "seconds" (wall) or "cpu_seconds", added up over jobs, of which several run at once.

    Processor time is not known of jobs in processes of their own; they count nothing there.
    """
    found = dict.fromkeys(STAGES[:-1], 0.0)
    for name, job in study.jobs.items():
        if job.stage in found and study.has(name):
            found[job.stage] += json.loads((study.run / "done" / f"{name}.json").read_text())[clock] or 0.0
    return found


def commits(study: Study) -> dict[str, int]:
    """Jobs by the commit that they ran on, which those of before 2026-11-28 have not written down."""
    done = [name for name, job in study.jobs.items() if job.stage != STAGES[-1] and study.has(name)]
    records = [json.loads((study.run / "done" / f"{name}.json").read_text()) for name in done]
    return dict(Counter(record.get("commit") or "not written down" for record in records))


def machine(study: Study) -> dict:
    """What it ran on, as the training runs wrote it down, and the processor."""
    written = study.run / "pretrain" / study.pretrained(1) / "environment.json"
    environment = json.loads(written.read_text()) if written.is_file() else {}
    processor = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    device = environment.get("device", study.size.device)
    return {"processor": processor, "device": device, "parallel_jobs": study.size.parallel_jobs, "threads_a_job": 1}


def warmup_fraction() -> float:
    """The share of the steps that train.yaml gives all runs."""
    return OmegaConf.load(Path(__file__).with_name(CONFIG)).optimizer.warmup_fraction


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def rounded(value, digits: int = 5):
    """Floats with few digits, at any depth: the rest is noise."""
    if isinstance(value, dict):
        return {key: rounded(inner, digits) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner, digits) for inner in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
