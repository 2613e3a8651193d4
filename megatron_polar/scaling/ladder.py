"""The YAMLs of a scaling study: models of several sizes, each for the same tokens or for the same FLOPs. No torch.

Fixed tokens are the paper's rule (section 4.4: sizes from 50M to 1B on "sufficient data"); fixed FLOPs give IsoFLOP
profiles, for each budget several sizes whose steps follow from it (Hoffmann et al., arXiv 2203.15556, section 3.2).
FLOPs of a comparison are those of mean lengths (step_time.py); a run counts its own, which is what `fit` reads.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_polar.config.presets import Architecture, architecture_of
from megatron_polar.config.schema import ModelSection, ParallelSection, RunConfig
from megatron_polar.config.validate import validate
from megatron_polar.errors import UserError
from megatron_polar.scaling.laws import (
    FEWEST_TOKENS,
    FITTED_PARAMETERS,
    FITTED_REWARD_TOKENS,
    SIZES,
    Sizes,
    batch_size,
    peak_learning_rate,
)
from megatron_polar.scaling.plan import Cluster, Plan, make_plan
from megatron_polar.scaling.search import search_layouts
from megatron_polar.scaling.shapes import shape_of_size
from megatron_polar.scaling.step_time import Lengths, mean_work
from megatron_polar.scaling.table import short

_EVALUATIONS = 20
"""Of a run, so that the last one or two lie in the tail that `fit` averages."""
_FEW_STEPS = 100


@dataclass(frozen=True)
class LadderRequest:
    """Sizes (weights without the embedding), and either FLOP budgets or one amount of tokens."""

    sizes: tuple[float, ...]
    budgets: tuple[float, ...] = ()
    reward_tokens: float | None = None
    base_tokens: float | None = None
    hyper_parameters: Literal["paper", "base"] = "paper"
    """Learning rate and batch by the paper's laws, or as the base YAML has them."""
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rung:
    """One run of the study. `flops` and `tokens` are planned, of mean lengths; `epochs` None where there is no data."""

    name: str
    config: RunConfig
    parameters: int
    all_parameters: int
    budget: float | None
    flops: float
    tokens: float
    comparisons: int
    epochs: float | None


@dataclass(frozen=True)
class Ladder:
    """All rungs, what they were made from, and what to keep in mind."""

    rungs: tuple[Rung, ...]
    cluster: Cluster | None
    """None: on the CPU, one rank."""
    notes: tuple[str, ...]


def make_ladder(
    base: RunConfig,
    request: LadderRequest,
    *,
    cluster: Cluster,
    lengths: Lengths | None = None,
    with_paths: bool = True,
) -> Ladder:
    """Plan every run. With `run.device: cpu` all have one rank; else the fastest layout that fits the cluster.

    Raises UserError: nothing to hold out, data that is not there, sizes that give one shape, nothing that fits.
    """
    _check(base, request)
    on_cpu = base.run.device == "cpu"
    plan = make_plan(_without_start(base), cluster=cluster, with_paths=with_paths, lengths=lengths)
    problems = list(plan.paths.problems) if plan.paths else []
    if problems or plan.embedding_rows is None:
        refused = dataclasses.replace(plan, problems=tuple(problems or plan.problems))
        raise refused.refusal("--ladder", where="one CPU rank" if on_cpu else None)
    shapes = _shapes(request.sizes, like=architecture_of(base.model))
    rungs = [
        _rung(base, shape, request=request, budget=budget, seed=seed, plan=plan, on_cpu=on_cpu)
        for budget in request.budgets or (None,)
        for shape in shapes
        for seed in request.seeds or (base.run.seed,)
    ]
    return Ladder(tuple(rungs), None if on_cpu else cluster, tuple(_notes(rungs, request)))


def _check(base: RunConfig, request: LadderRequest) -> None:
    if bool(request.budgets) == (request.reward_tokens is not None):
        raise UserError("--ladder: give either --flops, a list of budgets, or --reward-tokens, the same for all sizes")
    if not base.data.validation:
        raise UserError("--ladder: data.validation is empty, and a law is fitted to held-out losses; name a dataset")
    source = base.train.init_from
    if source is not None and "{size}" not in source:
        raise UserError(
            f"--ladder: train.init_from={source} has one shape, and every size needs its own; write {{size}} in it (as "
            f"in checkpoints/base_{{size}}), which stands for a run's size as in its name, or set it to null"
        )


def _without_start(base: RunConfig) -> RunConfig:
    return dataclasses.replace(base, train=dataclasses.replace(base.train, init_from=None))


def _shapes(sizes: Sequence[float], *, like: Architecture) -> list[Architecture]:
    found: dict[Architecture, float] = {}
    for size in sizes:
        shape = shape_of_size(size, like=like)
        if shape in found:
            raise UserError(
                f"--sizes: {short(found[shape])} and {short(size)} both give {shape.num_layers} layers of hidden "
                f"{shape.hidden_size}; choose sizes that are further apart"
            )
        found[shape] = size
    return list(found)


# --- One run ---------------------------------------------------------------------------------------------------------


def _rung(
    base: RunConfig,
    shape: Architecture,
    *,
    request: LadderRequest,
    budget: float | None,
    seed: int,
    plan: Plan,
    on_cpu: bool,
) -> Rung:
    parameters, all_parameters = shape.num_parameters(0), shape.num_parameters(plan.embedding_rows)
    work, k = plan.work, base.data.candidates_per_comparison
    flops = 3 * shape.forward_flops(
        tokens=work.tokens, attended=work.attended, rewards=work.rewards, reward_keys=work.reward_keys
    )
    tokens = mean_work(plan.lengths, candidates=k, layout="packed").tokens
    wanted = budget / flops if budget is not None else request.reward_tokens / tokens
    lr, batch = _hyper_parameters(base, request, parameters=all_parameters, reward_tokens=wanted * tokens)
    steps = round(wanted / batch)
    size = short(parameters)
    amount = f"c{budget:.3g}".replace("e+", "e") if budget is not None else f"d{short(request.reward_tokens)}"
    name = f"n{size}_{amount}" + (f"_s{seed}" if len(request.seeds) > 1 else "")
    if steps < 1:
        raise UserError(
            f"--ladder: {name}: {wanted:.3g} comparisons are less than one step of {batch}; give a larger budget, or a "
            f"smaller train.global_batch_size with --hyper-parameters base"
        )
    source = base.train.init_from.replace("{size}", size) if base.train.init_from is not None else None
    config = dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, directory=f"{base.run.directory}/{name}", seed=seed),
        model=_model_section(base.model, shape),
        train=dataclasses.replace(
            base.train, global_batch_size=batch, num_steps=steps, num_epochs=None, init_from=source
        ),
        optimizer=dataclasses.replace(base.optimizer, lr=lr),
        evaluation=dataclasses.replace(base.evaluation, interval=math.ceil(steps / _EVALUATIONS)),
    )
    config = _on_one_rank(config) if on_cpu else _fastest_layout(config, plan=plan, name=name)
    validate(config)
    comparisons = steps * batch
    return Rung(
        name=name,
        config=config,
        parameters=parameters,
        all_parameters=all_parameters,
        budget=budget,
        flops=comparisons * flops,
        tokens=comparisons * tokens,
        comparisons=comparisons,
        epochs=comparisons / plan.num_comparisons if plan.num_comparisons else None,
    )


def _hyper_parameters(
    base: RunConfig, request: LadderRequest, *, parameters: int, reward_tokens: float
) -> tuple[float, int]:
    """Peak learning rate (four digits) and comparisons a step."""
    if request.hyper_parameters == "base":
        return base.optimizer.lr, base.train.global_batch_size
    preset = SIZES.get(base.model.preset or "")
    base_tokens = request.base_tokens or (preset.base_tokens if preset else None)
    if reward_tokens < FEWEST_TOKENS or base_tokens is None:
        why = (
            f"{short(reward_tokens)} tokens are far below what they were fitted on"
            if reward_tokens < FEWEST_TOKENS
            else "they ask for --base-tokens, what the base models were pre-trained on"
        )
        raise UserError(
            f"--ladder: the paper's laws give no learning rate and batch here: {why}; or give --hyper-parameters base "
            f"to take optimizer.lr and train.global_batch_size of the YAML for all sizes"
        )
    sizes = Sizes(parameters, base_tokens=base_tokens, reward_tokens=reward_tokens)
    return float(f"{peak_learning_rate(sizes):.4g}"), max(1, round(batch_size(sizes)))


def _model_section(base: ModelSection, shape: Architecture) -> ModelSection:
    """The shape spelt out; initial weights as the base YAML says, if it does."""
    fields = dataclasses.asdict(shape)
    if base.init_method_std is not None:
        fields["init_method_std"] = base.init_method_std
    return dataclasses.replace(base, preset=None, **fields)


def _on_one_rank(config: RunConfig) -> RunConfig:
    minutes = config.parallel.distributed_timeout_minutes
    return dataclasses.replace(config, parallel=ParallelSection(distributed_timeout_minutes=minutes))


def _fastest_layout(config: RunConfig, *, plan: Plan, name: str) -> RunConfig:
    longest = plan.paths.longest_response if plan.paths else None
    found = search_layouts(
        config,
        cluster=plan.cluster,
        work=plan.work,
        embedding_rows=plan.embedding_rows,
        longest_response=longest,
        most=1,
    )
    if not found:
        raise UserError(
            f"--ladder: {name}: no layout fits {plan.cluster.name} with {config.train.global_batch_size} comparisons a "
            f"step; take fewer GPUs for small batches, more or larger ones for large models (run.device=cpu: one rank)"
        )
    return found[0].config


def _notes(rungs: Sequence[Rung], request: LadderRequest) -> list[str]:
    notes = []
    few = [rung.name for rung in rungs if rung.config.train.num_steps < _FEW_STEPS]
    if few:
        notes.append(f"fewer than {_FEW_STEPS} steps, mostly warm-up: {', '.join(few)}")
    again = [rung for rung in rungs if (rung.epochs or 0.0) > 1]
    if again:
        most = max(rung.epochs for rung in again)
        notes.append(f"{len(again)} runs see prompts again, up to {most:.3g} times: laws of D are for fresh data")
    if request.hyper_parameters == "paper":
        (low, high), (least, most) = FITTED_PARAMETERS, FITTED_REWARD_TOKENS
        if any(not low <= rung.all_parameters <= high or not least <= rung.tokens <= most for rung in rungs):
            notes.append(
                f"the paper's laws of learning rate and batch were fitted on {short(low)} to {short(high)} weights "
                f"and {short(least)} to {short(most)} tokens, and some runs lie beyond"
            )
    if request.hyper_parameters == "base" and len(rungs) > 1:
        notes.append("one learning rate for all sizes: the largest may want a lower one")
    if len(request.seeds) > 1:
        notes.append("a seed also draws other comparisons from the held-out data, so losses scatter by that, too")
    return notes
