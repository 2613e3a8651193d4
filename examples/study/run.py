"""make study: what POLAR's claims come to here, in small: policies, base models, pre-training, fine-tuning, a report.

run.py --data DIR [--size cpu|gpu|smoke] [--stages NAME ...] [--run DIR] [--docs DIR] [--list | --partial]

Every job is one command, which is printed; finished ones are kept, so that the same call goes on where the last one
stopped. Needs the public sets (sources.py says which files); `--size smoke` makes its own.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs import Jobs, end_with_children, refuse_foreign
from sizes import SIZES
from sources import source_files
from stages import STAGES, Study

from megatron_polar.errors import INTERRUPTED, USER_ERROR, UserError

_ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the public sets; not for --size smoke")
    parser.add_argument("--size", choices=sorted(SIZES), default="cpu")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="NAME", help=", ".join(STAGES)
    )
    parser.add_argument("--run", type=Path, help="where everything is written (default: runs/study/SIZE)")
    parser.add_argument(
        "--docs", type=Path, help="folder of study.json and study.md (default: docs; else the run's own)"
    )
    parser.add_argument("--list", action="store_true", help="print the commands and the guessed time, and run nothing")
    parser.add_argument("--partial", action="store_true", help="run nothing, and report on what is done so far")
    options = parser.parse_args(arguments)
    os.chdir(_ROOT)  # commands name examples/study/train.yaml
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core a job
    end_with_children()
    try:
        return run_study(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


def run_study(options: argparse.Namespace) -> int:
    """Build the jobs and run them, or list them."""
    size = SIZES[options.size]
    run = options.run or Path("runs/study") / size.name
    refuse_foreign(run)
    data = options.data or run / "generated"
    if size.name == "smoke" and options.data is None:
        from generated import write_generated

        write_generated(data)
    elif options.data is None:
        raise UserError("--data is missing: the folder with the public sets (make study DATA=...)")
    digests = tuple((str(p.relative_to(data)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in source_files(data))
    docs = options.docs or (Path("docs") if size.name == "cpu" else run / "docs")
    study = Study(size, data, run, docs, digests)
    described = {"size": size.describe(), "data": str(data), "docs": str(docs), "files": dict(digests)}
    described["generated"] = options.data is None
    (run / "study.json").write_text(json.dumps(described, indent=2) + "\n")
    if options.partial:
        from report import main as report  # matplotlib and scipy, which nothing else here needs

        return report(["--run", str(run), "--docs", str(docs), "--partial"])
    jobs = Jobs(run, study.jobs, parallel=size.parallel_jobs, forks=size.forks)
    if options.list:
        chosen = [job for job in study.jobs.values() if job.stage in options.stages]
        print("\n".join(job.shown for job in chosen))
        for stage in options.stages:
            seconds = sum(job.seconds for job in chosen if job.stage == stage)
            print(f"# {stage}: {seconds / 60:.0f} minutes of one core, guessed")
        return 0
    status = jobs.run(options.stages)
    if status == 0 and STAGES[-1] in options.stages:
        print(f"page: {docs / 'study.md'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
