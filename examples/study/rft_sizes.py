"""How large the RFT study is: models, data and steps of `--size smoke`, `cpu` and `gpu`."""

from dataclasses import dataclass

from rft_policies import Draw, Fit, Shape
from rft_problems import HABITS, Problem, draw_problems


@dataclass(frozen=True)
class Parts:
    """Problems by what they are for; no two parts, of whatever run, share one."""

    base: list[Problem]  # the base model, the policies with habits and the policy's warm start learn from these
    prompts: list[Problem]  # trajectories for pre-training
    heldout: list[Problem]  # trajectories of policies that pre-training never sees
    labels: list[Problem]  # answers whose order the reward models are fine-tuned on; of one run, as all that follow
    rft: list[Problem]  # prompts and references of GRPO and of SFT
    test: list[Problem]  # judged


@dataclass(frozen=True)
class Counts:
    """How many problems each part has."""

    base: int
    prompts: int
    heldout: int
    labels: int
    rft: int
    test: int


@dataclass(frozen=True)
class RewardTraining:
    """One training of a reward model; `batch` counts comparisons."""

    steps: int
    batch: int
    lr: float
    warmup_fraction: float = 0.25  # of the steps: long, as in train.yaml


@dataclass(frozen=True)
class Grpo:
    """TRL's GRPO: `batch` answers a step, `generations` of them to each problem."""

    steps: int
    batch: int
    generations: int
    lr: float


@dataclass(frozen=True)
class Size:
    """Everything that a size decides."""

    largest: int  # number that a problem starts with
    counts: Counts
    shape: Shape  # of the policies, the base model and the reward models
    base: Fit
    stages: dict[str, int]  # copies of the base model after so many steps, from which policies are made, too
    habit: Fit  # from the base model to a policy with a habit
    habits: tuple[str, ...]  # of the policies that pre-training sees
    unseen_habits: tuple[str, ...]  # of those that it does not
    mixture: dict[str, float]  # habits of the policy that is to be improved, with their probabilities
    warm: Fit  # from the base model to that policy
    pool_draw: Draw  # of the pool's trajectories: cooler, so that small models keep to their habits
    draw: Draw  # of the policy's answers that labels are about
    pretrain: RewardTraining
    finetune: RewardTraining
    answers_per_label: int  # drawn from the policy for each problem of `labels` and `test`
    grpo: Grpo
    sft: Fit  # as many steps as GRPO, as many sequences a step
    draws_per_test: int  # sampled answers to each test problem
    runs: int  # policies and reward models anew, each with seeds and problems of its own
    device: str


UNSEEN_HABITS = ("two_more", "five_more", "seven_less", "thirty_more")
HABITS_OF_THE_POOL = tuple(habit for habit in HABITS if habit not in UNSEEN_HABITS)
"""Many, so that to compare two numbers is less to learn than to know every habit by itself."""
MIXTURE = {"exact": 0.3, "two_more": 0.4, "one_less": 0.1, "no_carry": 0.1, "digits_swapped": 0.1}
"""Mostly wrong, with one wrong habit more frequent than the right one, which no policy of the pool has."""

SIZES = {
    "smoke": Size(
        largest=12,
        counts=Counts(base=300, prompts=60, heldout=30, labels=60, rft=32, test=40),
        shape=Shape(32, 1, 2),
        base=Fit(steps=200, batch=32, lr=1e-2, on_prompts=True, muon_lr=2e-2),
        stages={"early": 15},
        habit=Fit(steps=5, batch=32, lr=2e-3),
        habits=("exact", "one_more"),
        unseen_habits=("ten_more", "one_less"),
        mixture={"exact": 0.5, "two_more": 0.5},
        warm=Fit(steps=40, batch=32, lr=3e-3),
        pool_draw=Draw(max_tokens=36, temperature=0.5),
        draw=Draw(max_tokens=36),
        pretrain=RewardTraining(steps=4, batch=16, lr=1e-3),
        finetune=RewardTraining(steps=3, batch=4, lr=1e-3),
        answers_per_label=8,
        grpo=Grpo(steps=3, batch=16, generations=4, lr=1e-3),
        sft=Fit(steps=3, batch=16, lr=1e-3),
        draws_per_test=1,
        runs=1,
        device="cpu",
    ),
    "cpu": Size(
        largest=99,
        counts=Counts(base=12000, prompts=1800, heldout=200, labels=500, rft=400, test=300),
        shape=Shape(64, 6, 4),
        base=Fit(steps=1600, batch=32, lr=4e-3, on_prompts=True, muon_lr=2e-2),
        stages={"early": 100},
        habit=Fit(steps=60, batch=32, lr=1e-3),
        habits=HABITS_OF_THE_POOL,
        unseen_habits=UNSEEN_HABITS,
        mixture=MIXTURE,
        warm=Fit(steps=100, batch=64, lr=1e-3),
        pool_draw=Draw(max_tokens=28, temperature=0.3),
        draw=Draw(max_tokens=28),
        pretrain=RewardTraining(steps=600, batch=32, lr=3e-3),
        finetune=RewardTraining(steps=80, batch=32, lr=1e-3),
        answers_per_label=4,
        grpo=Grpo(steps=60, batch=64, generations=8, lr=2e-4),
        sft=Fit(steps=60, batch=64, lr=2e-4),
        draws_per_test=2,
        runs=6,
        device="cpu",
    ),
    "gpu": Size(
        largest=999,
        counts=Counts(base=20000, prompts=20000, heldout=1000, labels=2000, rft=4000, test=1000),
        shape=Shape(256, 6, 8),
        base=Fit(steps=4000, batch=128, lr=2e-3, on_prompts=True, muon_lr=2e-2),
        stages={"early": 200},
        habit=Fit(steps=200, batch=64, lr=5e-4),
        habits=HABITS_OF_THE_POOL,
        unseen_habits=UNSEEN_HABITS,
        mixture=MIXTURE,
        warm=Fit(steps=100, batch=128, lr=5e-4),
        pool_draw=Draw(max_tokens=48, temperature=0.3),
        draw=Draw(max_tokens=48),
        pretrain=RewardTraining(steps=3000, batch=128, lr=5e-4),
        finetune=RewardTraining(steps=200, batch=64, lr=2e-4),
        answers_per_label=4,
        grpo=Grpo(steps=500, batch=256, generations=16, lr=2e-4),
        sft=Fit(steps=500, batch=256, lr=2e-4),
        draws_per_test=4,
        runs=5,
        device="cuda",
    ),
}


def draw_parts(size: Size, *, seed: int, run: int = 0) -> Parts:
    """One draw of problems, cut into the parts that all runs share and those of run `run` (from 0)."""
    counts = vars(size.counts)
    own = ("labels", "rft", "test")
    shared_names = [name for name in counts if name not in own]
    num_shared, num_own = (sum(counts[name] for name in names) for names in (shared_names, own))
    problems = draw_problems(num_shared + size.runs * num_own, seed=seed, largest=size.largest)
    parts, first = {}, 0
    for name in (*shared_names, *own):
        first = num_shared + run * num_own if name == own[0] else first
        parts[name] = problems[first : first + counts[name]]
        first += counts[name]
    return Parts(**parts)
