"""RunConfig + cluster → what the run would be, and everything that would stop it. No torch."""

import dataclasses
from dataclasses import dataclass
from itertools import product

from megatron_polar.config.presets import padded_vocab_size
from megatron_polar.config.schema import RunConfig
from megatron_polar.config.validate import validate
from megatron_polar.errors import UserError
from megatron_polar.scaling.hardware import GPUS, Gpu
from megatron_polar.scaling.memory import Layout, MemoryEstimate, estimate_memory, layout_of, usable_bytes
from megatron_polar.scaling.paths import Paths, look_at_paths
from megatron_polar.scaling.step_time import Lengths, StepTime, Work, estimate_step_time, mean_work

GB = 1e9
_ASSUMED_VOCABULARY = dict.fromkeys(("polar_1_8b", "polar_7b", "polar_20b"), 92544)  # InternLM2's


@dataclass(frozen=True)
class Cluster:
    """The machines of a run; GB are 10^9 bytes."""

    num_nodes: int
    gpus_per_node: int
    gpu_memory_gb: float
    gpu: Gpu = GPUS["h100"]

    def __post_init__(self):
        for option, value in (("--nodes", self.num_nodes), ("--gpus-per-node", self.gpus_per_node)):
            if value < 1:
                raise UserError(f"{option} {value} must be at least 1")
        if not 0 < self.gpu_memory_gb < float("inf"):
            raise UserError(f"--gpu-memory-gb {self.gpu_memory_gb} must be above 0")

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def gpu_bytes(self) -> float:
        return self.gpu_memory_gb * GB

    @property
    def name(self) -> str:
        return f"{plural(self.num_nodes, 'node')} x {plural(self.gpus_per_node, 'GPU')} of {self.gpu_memory_gb:g} GB"


@dataclass(frozen=True)
class Plan:
    """What a run would be on a cluster. No problems: go."""

    config: RunConfig
    cluster: Cluster
    paths: Paths | None
    """None where no file was to be opened."""
    embedding_rows: int | None
    layout: Layout | None
    """None where the world size does not fit the parallel sizes."""
    memory: MemoryEstimate | None
    """None where there is no layout, or the vocabulary is unknown."""
    lengths: Lengths
    """As given, else of the data, else assumed."""
    are_lengths_assumed: bool
    problems: tuple[str, ...]
    """One line each: what, where, why and the remedy."""

    @property
    def is_on_cpu(self) -> bool:
        return self.config.run.device == "cpu"

    @property
    def place(self) -> str:
        """Where it would run, in words."""
        return plural(self.cluster.num_gpus, "CPU rank") if self.is_on_cpu else self.cluster.name

    @property
    def work(self) -> Work:
        """Mean work of a comparison."""
        data = self.config.data
        return mean_work(self.lengths, candidates=data.candidates_per_comparison, layout=data.layout)

    @property
    def time(self) -> StepTime | None:
        """Of a step of this layout; None where its memory is not known."""
        if self.memory is None:
            return None
        return estimate_step_time(
            self.config,
            layout=self.memory.layout,
            work=self.work,
            gpu=self.cluster.gpu,
            gpus_per_node=self.cluster.gpus_per_node,
            embedding_rows=self.embedding_rows,
        )

    @property
    def num_comparisons(self) -> int:
        """Comparisons of an epoch; 0 where no dataset could be read."""
        return sum(facts.num_comparisons for facts in self.paths.train) if self.paths else 0

    @property
    def num_steps(self) -> int | None:
        """Optimizer steps of the run, as train/build.py counts them; None where no dataset could be read."""
        train = self.config.train
        if train.num_steps is not None:
            return train.num_steps
        if not self.num_comparisons:
            return None
        return int(train.num_epochs * self.num_comparisons / train.global_batch_size)

    def refusal(self, name: str, *, where: str | None = None) -> UserError | None:
        """All problems in one error, a line each; None when there are none. `where`: if not on the cluster."""
        if not self.problems:
            return None
        heading = f"{name} on {where or self.place}: {plural(len(self.problems), 'problem')}"
        return UserError("\n  ".join([heading, *self.problems]))


def make_plan(config: RunConfig, *, cluster: Cluster, with_paths: bool = True, lengths: Lengths | None = None) -> Plan:
    """Check a run that `load_config` has accepted against a cluster. Not `with_paths`: no file is opened. `lengths`
    go before those of the data. With `run.device: cpu` a GPU of the cluster is a process, and memory is not checked."""
    paths = look_at_paths(config) if with_paths else None
    problems = list(paths.problems) if paths else []
    rows = _embedding_rows(config, paths=paths, problems=problems)
    layout = memory = None
    try:
        layout = layout_of(config.parallel, world_size=cluster.num_gpus)
        if rows is not None:
            memory = _estimate(config, cluster=cluster, rows=rows, paths=paths)
    except UserError as error:
        problems.append(str(error))
    if layout is not None:
        _check_batch(config, ranks=layout.dp, problems=problems)
    if memory is not None and config.run.device != "cpu" and not memory.fits(cluster.gpu_bytes):
        problems.append(_too_large(config, memory=memory, cluster=cluster, rows=rows, paths=paths))
    if lengths is not None:
        _check_lengths(config, lengths=lengths, problems=problems)
    known = lengths or _lengths_of(paths)
    plan = Plan(config, cluster, paths, rows, layout, memory, known or Lengths(), known is None, tuple(problems))
    return dataclasses.replace(plan, problems=(*problems, *_too_few_comparisons(plan)))


def _lengths_of(paths: Paths | None) -> Lengths | None:
    """A manifest counts prompts and answers together; they are divided as in the default mix. None without data."""
    halves = sum(facts.num_halves for facts in paths.train) if paths else 0
    if not halves:
        return None
    mean, usual = sum(facts.num_tokens for facts in paths.train) / halves, Lengths()
    share = usual.prompt / (usual.prompt + usual.answer)
    return Lengths(prompt=share * mean, answer=(1 - share) * mean)


def plural(number: int, noun: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


# --- Checks ----------------------------------------------------------------------------------------------------------


def _embedding_rows(config: RunConfig, *, paths: Paths | None, problems: list[str]) -> int | None:
    """Rows of the embedding, as model/build.py makes them; None where the vocabulary cannot be known."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    vocab_size = paths.vocab_size if paths else None
    wanted = model.vocab_size or vocab_size or _ASSUMED_VOCABULARY.get(model.preset or "")
    if wanted is None:
        if not problems and config.run.device != "cpu":  # a missing dataset, which would tell it, is named already
            problems.append(
                "model.vocab_size is not set, and no tokenizer could be read to tell it, so memory is unknown; set it, "
                + ("or data.tokenizer" if paths else "or leave out --no-paths")
            )
        return None
    if wanted < (vocab_size or 0):
        problems.append(
            f"model.vocab_size={wanted} is below the tokenizer's vocabulary of {vocab_size}; leave it out, or set at "
            f"least {vocab_size}"
        )
    rows = padded_vocab_size(wanted, multiple=model.make_vocab_size_divisible_by)
    if rows % tp:
        problems.append(
            f"parallel.tensor_model_parallel_size={tp} does not divide the padded vocabulary of {rows} rows; set "
            f"model.make_vocab_size_divisible_by to a multiple of it"
        )
    return rows


def _check_batch(config: RunConfig, *, ranks: int, problems: list[str]) -> None:
    """Any batch trains, since comparisons are dealt to ranks as they fit (data/balancing.py); fewer than ranks leave
    some with nothing but padding."""
    batch = config.train.global_batch_size
    if batch < ranks:
        problems.append(
            f"train.global_batch_size={batch} is less than one comparison for each of {ranks} data-parallel ranks, so "
            f"that some would compute padding; use at least {ranks}, or fewer nodes"
        )


def _check_lengths(config: RunConfig, *, lengths: Lengths, problems: list[str]) -> None:
    sequence, most = 2 * (lengths.prompt + lengths.answer) + 2, config.data.max_sequence_length
    if sequence > most:
        problems.append(
            f"--prompt-tokens {lengths.prompt:g} and --answer-tokens {lengths.answer:g}: two of each are {sequence:g} "
            f"tokens with the separators, and data.max_sequence_length={most} is all that a sequence may have"
        )


def _too_few_comparisons(plan: Plan) -> list[str]:
    if plan.num_steps is None or plan.num_steps >= 1:
        return []
    train = plan.config.train
    return [
        f"train.num_epochs={train.num_epochs} over {plan.num_comparisons} comparisons is less than one step of "
        f"train.global_batch_size={train.global_batch_size}; lower the batch size or add data"
    ]


# --- Memory ----------------------------------------------------------------------------------------------------------


def _estimate(config: RunConfig, *, cluster: Cluster, rows: int, paths: Paths | None) -> MemoryEstimate:
    longest = paths.longest_response if paths else None
    return estimate_memory(config, world_size=cluster.num_gpus, embedding_rows=rows, longest_response=longest)


def _too_large(config: RunConfig, *, memory: MemoryEstimate, cluster: Cluster, rows: int, paths: Paths | None) -> str:
    needed, usable = f"{memory.largest.total / GB:.1f}", f"{usable_bytes(cluster.gpu_bytes) / GB:.1f}"
    return (
        f"memory: {needed} GB on each GPU of pipeline stage {memory.largest.stage} by estimate, and {usable} of "
        f"{cluster.gpu_memory_gb:g} GB may be used; {_what_fits(config, cluster=cluster, rows=rows, paths=paths)}"
    )


def _what_fits(config: RunConfig, *, cluster: Cluster, rows: int, paths: Paths | None) -> str:
    """The fewest changes of overlap, recomputation, TP within a node and PP that fit by the estimate, as overrides."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    tps = [tp] + [size for size in (tp * 2**k for k in range(1, 10)) if cluster.gpus_per_node % size == 0]
    pps = [pp] if parallel.virtual_pipeline_model_parallel_size else [pp * 2**k for k in range(7)]
    overlaps = [config.optimizer.overlap_grad_reduce]
    if not (overlaps[0] or config.train.canonical_reduction):
        overlaps.append(True)  # cuts what a save gathers
    choices = list(product(dict.fromkeys((config.train.recompute, "full")), tps, pps, overlaps))
    now = (config.train.recompute, tp, pp, overlaps[0])
    changes = [sum(new != old for new, old in zip(choice, now, strict=True)) for choice in choices]
    for _, choice in sorted(zip(changes, choices, strict=True), key=lambda item: (item[0], item[1][2], item[1][1])):
        overrides = _overrides(config, recompute=choice[0], tp=choice[1], pp=choice[2], overlap=choice[3])
        changed = _change(config, overrides)
        try:
            validate(changed, for_training=False)
            memory = _estimate(changed, cluster=cluster, rows=rows, paths=paths)
        except UserError:
            continue
        if memory.fits(cluster.gpu_bytes) and rows % choice[1] == 0:
            text = " ".join(f"{key}={str(value).lower()}" for key, value in overrides.items())
            return f"{text} would take {memory.largest.total / GB:.1f} GB"
    return "no TP within a node, PP up to 64 times as large and recompute=full fits; take more or larger GPUs"


def _overrides(config: RunConfig, *, recompute: str, tp: int, pp: int, overlap: bool) -> dict[str, object]:
    """The keys to set for these choices, without those that stay."""
    parallel, overrides = config.parallel, {}
    if overlap != config.optimizer.overlap_grad_reduce:
        overrides |= {"optimizer.overlap_grad_reduce": overlap}
    if recompute != config.train.recompute:
        overrides |= {"train.recompute": recompute}
        if config.train.recompute_num_layers != 1:
            overrides |= {"train.recompute_num_layers": 1}
    if tp != parallel.tensor_model_parallel_size:
        overrides |= {"parallel.tensor_model_parallel_size": tp}
    if pp != parallel.pipeline_model_parallel_size:
        overrides |= {"parallel.pipeline_model_parallel_size": pp}
    if tp > 1 and not parallel.sequence_parallel:
        overrides |= {"parallel.sequence_parallel": True}
    return overrides


def _change(config: RunConfig, overrides: dict[str, object]) -> RunConfig:
    for name, value in overrides.items():
        section, key = name.split(".")
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})
    return config
