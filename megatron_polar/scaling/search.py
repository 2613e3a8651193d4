"""The fastest layouts of a run on a cluster: all that fit the model and the memory, by the estimate of step_time.py."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_polar.config.schema import RunConfig
from megatron_polar.config.validate import validate
from megatron_polar.errors import UserError
from megatron_polar.scaling.memory import Layout, MemoryEstimate, estimate_memory
from megatron_polar.scaling.plan import Cluster
from megatron_polar.scaling.step_time import StepTime, Work, estimate_step_time

_PIPELINE_SIZES = (1, 2, 4, 8, 16, 32)
_CHUNKS = (None, 2, 4)
_FEWEST_TOKENS = 8192
"""Of a row: shorter ones leave GPUs idle, which the estimate does not know."""
_PIPELINE = 1.1
"""What a pipeline must gain to come before a layout without one: its stages tell each other the length of every row and
wait for it, which the estimate does not know either (docs/performance.md)."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits: what to set, what it takes and how fast it is by the estimates."""

    config: RunConfig
    layout: Layout
    memory: MemoryEstimate
    time: StepTime

    @property
    def overrides(self) -> str:
        """What to write behind a YAML to get this layout."""
        parallel, train, optimizer = self.config.parallel, self.config.train, self.config.optimizer
        values = {
            "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "parallel.sequence_parallel": parallel.sequence_parallel,
            "parallel.pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "parallel.virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
            "train.recompute": train.recompute,
            "train.recompute_num_layers": train.recompute_num_layers,
            "optimizer.overlap_grad_reduce": optimizer.overlap_grad_reduce,
            "optimizer.overlap_param_gather": optimizer.overlap_param_gather,
            "data.max_tokens_per_micro_batch": self.config.data.max_tokens_per_micro_batch,
        }
        return " ".join(f"{key}={_as_yaml(value)}" for key, value in values.items())


def _as_yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def search_layouts(
    config: RunConfig,
    *,
    cluster: Cluster,
    work: Work,
    embedding_rows: int,
    longest_response: int | None = None,
    most: int = 5,
) -> list[Candidate]:
    """The fastest `most` layouts that fit, fastest first, those with a pipeline as if they took a tenth longer.

    Tried are TP inside a node, PP, interleaving, full recomputation, and rows of a half and a quarter of the configured
    tokens; context parallelism is as configured, and communication overlaps where that is possible.
    """
    found = []
    for candidate in _candidates(config, cluster=cluster):
        try:
            memory = estimate_memory(
                candidate,
                world_size=cluster.num_gpus,
                embedding_rows=embedding_rows,
                longest_response=longest_response,
            )
        except UserError:
            continue  # more ranks than GPUs, or some left over
        if not memory.fits(cluster.gpu_bytes) or candidate.train.global_batch_size < memory.layout.dp:
            continue
        if embedding_rows % memory.layout.tp:
            continue
        time = estimate_step_time(
            candidate, layout=memory.layout, work=work, gpu=cluster.gpu, gpus_per_node=cluster.gpus_per_node,
            embedding_rows=embedding_rows,
        )  # fmt: skip
        found.append(Candidate(candidate, memory.layout, memory, time))
    fastest: dict[tuple[Layout, str], Candidate] = {}  # of the same layout with rows of different lengths
    for one in sorted(found, key=_rank):
        fastest.setdefault((one.layout, one.config.train.recompute), one)
    return list(fastest.values())[:most]


def _rank(one: Candidate) -> tuple[float, int]:
    return one.time.seconds * (_PIPELINE if one.layout.pp > 1 else 1.0), one.memory.largest.total


def _candidates(config: RunConfig, *, cluster: Cluster) -> Iterator[RunConfig]:
    tensor = [2**power for power in range(10) if cluster.gpus_per_node % 2**power == 0]
    whole = config.data.max_tokens_per_micro_batch
    rows = [whole] + [whole // parts for parts in (2, 4) if whole // parts >= _FEWEST_TOKENS]
    for tp, pp, vpp, recompute, tokens in product(tensor, _PIPELINE_SIZES, _CHUNKS, ("none", "full"), rows):
        parallel = dataclasses.replace(
            config.parallel,
            tensor_model_parallel_size=tp,
            sequence_parallel=tp > 1,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
        )
        train = dataclasses.replace(config.train, recompute=recompute, recompute_num_layers=1)
        overlaps = not config.train.canonical_reduction
        shards = config.optimizer.use_distributed_optimizer
        optimizer = dataclasses.replace(
            config.optimizer, overlap_grad_reduce=overlaps, overlap_param_gather=overlaps and shards
        )
        data = dataclasses.replace(config.data, max_tokens_per_micro_batch=tokens)
        candidate = dataclasses.replace(config, parallel=parallel, train=train, optimizer=optimizer, data=data)
        try:
            validate(candidate, for_training=False)
        except UserError:
            continue
        yield candidate
