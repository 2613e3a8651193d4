"""How well `fit` finds laws that are known: synthetic studies whose runs scatter around a law, fitted by its own code.

How often 95 % intervals hold the true constants, what Huber's delta of the joint law does, and by how much the frontier
of loss and compute, which favours lucky runs, makes the exponent too large.
"""

import argparse
import platform
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import scipy
from arguments import positive

from megatron_polar import log
from megatron_polar.scaling.laws import PUBLISHED
from megatron_polar.scaling.power_law import SMALLEST_HUBER_DELTA, STRAIGHT, Law, joint_law, resample_residuals
from megatron_polar.scaling.runs import ScalingRun
from megatron_polar.scaling.selection import LawMissing, pareto_frontier

OF_SIZE, OF_COMPUTE = (
    np.array([np.log(law.coefficient), law.exponent])
    for law in (PUBLISHED["loss_of_parameters"], PUBLISHED["loss_of_compute"])
)
"""The paper's L(N) and L(C)."""
JOINT = np.array([np.log(6.0), np.log(40.0), 0.3, 0.28, np.log(0.2)])
JOINT_NAMES = ("log A", "log B", "alpha", "beta", "log E")
GRID = np.log([(n, d) for n in np.geomspace(1e6, 1e9, 5) for d in np.geomspace(1e8, 1e11, 4)])


@dataclass(frozen=True)
class JointStudy:
    """One synthetic study of the joint law: the constants found [5], and whether their intervals hold the truth [5]."""

    theta: np.ndarray
    holds: np.ndarray


def main() -> None:
    """Run the three parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=positive, default=2000, help="of straight lines")
    parser.add_argument("--joint-studies", type=positive, default=100, help="of L(N, D)")
    parser.add_argument("--replicates", type=positive, default=200, help="of one study's intervals")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("## Intervals of a straight line\n")
    print(straight_lines(options))
    print("\n## The joint law\n")
    print(joint_laws(options))
    print("\n## The frontier of loss and compute\n")
    print(frontiers(options))
    print(
        f"\nSeed {options.seed}; Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}."
    )


def straight_lines(options: argparse.Namespace) -> str:
    """Shares of studies whose 95 % interval holds the true exponent, and the loss of a run twice as large as any."""
    rows = []
    for num_runs, noise in ((4, 0.01), (6, 0.01), (6, 0.03), (10, 0.01)):
        log_x = np.log(np.geomspace(5e7, 1e9, num_runs))[:, None]
        largest, held = np.log([2e9]), []
        for study in log.progress(range(options.studies), f"{num_runs} runs, {noise:.0%} noise", unit="studies"):
            generator = np.random.default_rng([options.seed, 1, num_runs, round(1000 * noise), study])
            log_loss = STRAIGHT.log_loss(OF_SIZE, log_x) + generator.normal(0, noise, num_runs)
            theta = STRAIGHT.fit(log_x, log_loss)
            found = resample_residuals(STRAIGHT, theta, log_x, log_loss, replicates=options.replicates, seed=study)
            real = STRAIGHT.log_loss(OF_SIZE, largest[None])[0] + generator.normal(0, noise)
            exponent, prediction = found.interval(lambda theta: theta[1]), found.prediction(largest, seed=study)
            plain = np.percentile(found.drawn[:, 1], (2.5, 97.5))
            held.append(
                (
                    exponent.low <= OF_SIZE[1] <= exponent.high,
                    plain[0] <= OF_SIZE[1] <= plain[1],
                    prediction.low <= real <= prediction.high,
                )
            )
        rows.append([num_runs, f"{noise:.0%}", *(f"{share:.1%}" for share in np.mean(held, axis=0))])
    head = ("runs", "noise", "exponent held", "without the stretch by Student's t", "a larger run's loss held")
    return f"{_table(head, rows)}\n\n{options.studies:,} studies a row, {options.replicates} replicates each."


def joint_laws(options: argparse.Namespace) -> str:
    """Coverage of the five constants and the scatter of both exponents, with Huber's delta by the runs' scatter and
    with the 0.001 of Hoffmann et al."""
    rows = []
    for noise in (0.004, 0.01):
        by_scatter = _joint_studies(options, noise=noise, law_of=joint_law)
        fixed = Law(2, has_floor=True, huber_delta=SMALLEST_HUBER_DELTA)
        as_published = _joint_studies(options, noise=noise, law_of=lambda log_x, log_loss, law=fixed: law)
        for name, studies in (("by scatter", by_scatter), ("0.001", as_published)):
            coverage = np.mean([study.holds for study in studies], axis=0)
            deviation = np.std([study.theta for study in studies], axis=0, ddof=1)[2:4]
            rows.append(
                [f"{noise:.1%}", name, *(f"{share:.0%}" for share in coverage), *(f"{sd:.4f}" for sd in deviation)]
            )
    head = ("noise", "Huber's delta", *(f"{name} held" for name in JOINT_NAMES), "sd of alpha", "sd of beta")
    return (
        f"{_table(head, rows)}\n\n{options.joint_studies:,} studies a row of {len(GRID)} runs, "
        f"{options.replicates} replicates each; alpha is {JOINT[2]}, beta {JOINT[3]}."
    )


def _joint_studies(
    options: argparse.Namespace, *, noise: float, law_of: Callable[[np.ndarray, np.ndarray], Law]
) -> list[JointStudy]:
    studies = []
    for study in log.progress(range(options.joint_studies), f"joint law, {noise:.1%} noise", unit="studies"):
        generator = np.random.default_rng([options.seed, 2, round(1000 * noise), study])
        log_loss = Law(2, has_floor=True).log_loss(JOINT, GRID) + generator.normal(0, noise, len(GRID))
        law = law_of(GRID, log_loss)
        theta = law.fit(GRID, log_loss)
        found = resample_residuals(law, theta, GRID, log_loss, replicates=options.replicates, seed=study)
        intervals = [found.interval(lambda theta, index=index: theta[index]) for index in range(len(JOINT))]
        holds = [one.low <= truth <= one.high for one, truth in zip(intervals, JOINT, strict=True)]
        studies.append(JointStudy(theta, np.array(holds)))
    return studies


def frontiers(options: argparse.Namespace) -> str:
    """Mean exponents of all runs and of those on the frontier; four sizes, each with two amounts of compute."""
    rows = []
    for span in (20, 100):
        for noise in (0.01, 0.02):
            every, chosen = [], []
            for study in range(options.studies):
                runs = _runs_over_compute(span, noise=noise, seed=[options.seed, 3, span, round(1000 * noise), study])
                every.append(_exponent(runs))
                with suppress(LawMissing):
                    chosen.append(_exponent(pareto_frontier(runs, count="parameters")))
            cells = (f"{span}x", f"{noise:.0%}", _mean(every), _mean(chosen), f"{len(chosen) / options.studies:.1%}")
            rows.append(cells)
    head = ("compute", "noise", "exponent of all runs", "of the frontier", "studies with a frontier of three")
    return (
        f"{_table(head, rows)}\n\n{options.studies:,} studies a row of 8 runs, mean and its standard error; "
        f"the true exponent is {OF_COMPUTE[1]}."
    )


def _runs_over_compute(span: float, *, noise: float, seed: Sequence[int]) -> list[ScalingRun]:
    flops = np.geomspace(1e18, span * 1e18, 8)
    scatter = np.random.default_rng(seed).normal(0, noise, len(flops))
    losses = np.exp(STRAIGHT.log_loss(OF_COMPUTE, np.log(flops)[:, None]) + scatter)
    return [
        ScalingRun(f"run-{number}", 10**8 * (1 + number // 2), float(loss), flops=float(at))
        for number, (at, loss) in enumerate(zip(flops, losses, strict=True))
    ]


def _exponent(runs: Sequence[ScalingRun]) -> float:
    flops, losses = (np.array([getattr(run, name) for run in runs]) for name in ("flops", "loss"))
    return float(STRAIGHT.fit(np.log(flops)[:, None], np.log(losses))[1])


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.4f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    main()
