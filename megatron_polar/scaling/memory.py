"""Memory of one GPU for a run, in bytes: arithmetic from the sources named below. One H200 took 2 to 4 % less than that
(benchmarks/gpu_h200.md).

Counted is the GPU path: megatron-core 0.16.1 with Transformer Engine 2.11's layers and a flash kernel for attention.
Notation: h hidden size, n query heads, g key/value heads, d head dim, f FFN width, K candidates of a comparison, t
tensor-parallel size, p = t with sequence parallelism and 1 without, e bytes of an element (2 in bf16, 4 in fp32).

Bytes per weight of a rank (model/build.py, train/optimizer.py; D = data- times context-parallel size with the
distributed optimizer, else 1):

| what | bf16 | fp32 | where it is made |
|---|---|---|---|
| weight (reward head: 4) | 2 | 4 | DDP's param_data |
| gradient, summed over micro-batches | 4 | 4 | DDP's grad_data; grad_reduce_in_fp32 with bf16 |
| fp32 weight (reward head: 0) | 4/D | 0 | DistributedOptimizer's shard_fp32_from_float16_groups |
| AdamW's two moments, fp32 | 8/D | 8/D | the same shards |

Bytes that one layer keeps for its backward pass, for each token of a row on this rank:

| what | bytes | who keeps it |
|---|---|---|
| input of both norms: the residual stream, twice | 2eh/p | TE LayerNormLinear (inputmat) |
| output of both norms, before any all-gather | 2eh/p | TE LayerNormLinear (ln_out) |
| 1/rms of both norms, fp32 | 8/p | TE LayerNormLinear (rsigma) |
| queries after RoPE | end/t | attention kernel |
| gathered keys and values; a prefix stands there once for each of K candidates at most | 2Kegd/t | attention kernel |
| attention's output (with context parallelism once more, behind the all-to-all) | end/t | kernel and linear_proj |
| softmax statistics, fp32 | 4n/t | attention kernel |
| output of fc1: gate and up | 2ef/t | SwiGLUFunction |
| SwiGLU's output | ef/t | linear_fc2 |
| dropout masks, if `hidden_dropout` > 0 | 2h/p | torch dropout, twice |
| inputs of the norms on queries and keys, if `qk_layernorm` | e(n+g)d/t | TE RMSNorm |

With `train.fp8` weights and these bytes change in the layers that run in FP8: fp8.py has the tables.

QKV before RoPE is not kept: RoPE's backward needs angles only, and keys and values are copied by the gather.
`recompute: selective` keeps, instead of gathered keys, values and statistics, the keys (egd/t) and the unsplit output
of linear_qkv (e(n+2g)d/t), which the values are a view of: with fused attention it seldom saves anything. With
`recompute: full` a layer's bytes are there for one block of `recompute_num_layers` layers at a time, and the block
keeps its input, eh/p a token. One micro-batch on one model chunk also keeps the RoPE angles (4d a token), the last
stage the final norm's input (eh/p) and, with pipelines, a stage's output until its backward pass (eh/p;
deallocate_pipeline_outputs is off). Index tensors of a few bytes a token are left out. The last layer keeps less than
the others (model/reward_rows.py) and is counted as they are.

A pipeline stage i of P holds min(P - i, m) of m micro-batches between their forward and backward pass under 1F1B. With
V chunks a stage (interleaved) it holds min(2(P - i - 1) + (V - 1)P + 1, mV) chunks' worth (megatron-core's
get_pp_rank_microbatches: warm-up plus one).

Buffers that come and go, at their largest in the backward pass through fc1: the gradient of its output (2ef/t a token),
its all-gathered input and the gradient of that (2eh), the gradient of the residual stream (eh/p), and the largest
weight's gradient before it is added to the fp32 one (e a weight).

A save has a peak of its own, when activations and these buffers are gone. With the distributed optimizer megatron-core
(get_parameter_state_dp_zero) gathers its state on every rank, one bucket of DDP's and one of its three fp32 tensors at
a time: 4/D bytes a weight of the bucket that are sent, 4 received, and 4 more into which NCCL gathers before torch
copies them apart. A bucket is all weights of a model chunk: only with `overlap_grad_reduce`, and on the first pipeline
stage alone, is it closed at 40 million weights, or a million for each data-parallel rank where that is more, of which
the last may be a large one. `fp8_param_gather` then takes 2 bytes for each weight in FP8 (train/main_weights.py). The
larger of the two peaks counts.
"""

import dataclasses
from dataclasses import dataclass

from megatron_polar.config.presets import Architecture, architecture_of
from megatron_polar.config.schema import DataSection, ParallelSection, RunConfig
from megatron_polar.errors import UserError
from megatron_polar.scaling.fp8 import WEIGHT_BYTES, change_of_activations, num_fp8_layers

RUNTIME_BYTES = 3 * 2**30
"""CUDA context, NCCL's buffers, cuBLAS and cuDNN workspaces, token and index tensors of a step. Assumed, not
measured."""
FRAGMENTATION = 0.1
"""Share of activations and buffers that the allocator wastes between them. Assumed, not measured."""
MARGIN = 0.05
"""Share of the GPU's memory that must stay free for a run to fit."""


@dataclass(frozen=True)
class Layout:
    """Parallel sizes with the data-parallel size that is left."""

    tp: int
    pp: int
    vpp: int | None
    cp: int
    dp: int
    sequence_parallel: bool

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one GPU of a pipeline stage; `in_flight` counts micro-batches (times chunks, if interleaved)."""

    stage: int
    num_parameters: int
    in_flight: int
    weights: int
    fp8_weights: int
    """Weights in FP8 and their transposes (0 without `train.fp8`)."""
    gradients: int
    optimizer: int
    activations: int
    recomputed: int
    buffers: int
    saving: int
    """Optimizer state gathered while a checkpoint is saved, when nothing of a step is left."""
    runtime: int

    @property
    def states(self) -> int:
        """What is always there."""
        return self.weights + self.fp8_weights + self.gradients + self.optimizer

    @property
    def step(self) -> int:
        """What comes and goes in a training step, at its most."""
        return self.activations + self.recomputed + self.buffers

    @property
    def total(self) -> int:
        return self.states + max(self.step, self.saving) + self.runtime


@dataclass(frozen=True)
class MemoryEstimate:
    """Every pipeline stage; `row_tokens` is the largest micro-batch, over all context-parallel ranks."""

    layout: Layout
    row_tokens: int
    stages: tuple[StageMemory, ...]

    @property
    def largest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)

    def fits(self, gpu_bytes: float) -> bool:
        """Whether the largest stage leaves MARGIN of a GPU's memory free."""
        return self.largest.total <= usable_bytes(gpu_bytes)


def usable_bytes(gpu_bytes: float) -> float:
    """What a run may take of a GPU's memory."""
    return (1 - MARGIN) * gpu_bytes


def layout_of(parallel: ParallelSection, *, world_size: int) -> Layout:
    """Raises UserError where the world size is not a multiple of TP x PP x CP."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, ranks = parallel.context_parallel_size, tp * pp * parallel.context_parallel_size
    if world_size < ranks or world_size % ranks:
        raise UserError(
            f"parallel: {world_size} GPUs are not a multiple of tensor x pipeline x context parallel size "
            f"({tp} x {pp} x {cp} = {ranks}), and some would be left over; give a multiple of {ranks}, or change the "
            f"sizes"
        )
    vpp = parallel.virtual_pipeline_model_parallel_size
    return Layout(tp, pp, vpp, cp, world_size // ranks, parallel.sequence_parallel)


def stage_parameters(architecture: Architecture, *, embedding_rows: int, layout: Layout, stage: int) -> int:
    """Weights on each rank of a pipeline stage, exactly. `embedding_rows` is the padded vocabulary."""
    a = architecture
    qkv_bias = (a.num_attention_heads + 2 * a.num_query_groups) * a.kv_channels if a.add_qkv_bias else 0
    norms = 2 * a.hidden_size + (2 * a.kv_channels if a.qk_layernorm else 0)  # whole on every tensor-parallel rank
    count = a.num_layers // layout.pp * ((a.layer_parameters + qkv_bias) // layout.tp + norms)
    if stage == 0:
        count += embedding_rows // layout.tp * a.hidden_size
    if stage == layout.pp - 1:
        count += 2 * a.hidden_size  # final norm, reward head
    return count


def longest_comparison(data: DataSection, *, longest_response: int | None = None) -> int:
    """Tokens of the longest comparison in a row of its own: micro-batches are larger than asked for one that is longer.

    `longest_response` in tokens is in the dataset's manifest; without one, the longest that training accepts.
    """
    k = data.candidates_per_comparison
    if data.layout != "shared_prefix":
        return k * data.max_sequence_length
    longest_response = longest_response or data.max_sequence_length // 2 - 2
    return data.max_sequence_length + (k - 1) * (longest_response + 1)  # and the reward token of each candidate


def estimate_memory(
    config: RunConfig, *, world_size: int, embedding_rows: int, longest_response: int | None = None
) -> MemoryEstimate:
    """Memory of a GPU of every pipeline stage, for the largest micro-batch. Raises UserError as `layout_of` does."""
    layout = layout_of(config.parallel, world_size=world_size)
    longest = max(
        config.data.max_tokens_per_micro_batch, longest_comparison(config.data, longest_response=longest_response)
    )
    multiple = config.data.pad_to_multiple * layout.tp * layout.cp
    row_tokens = -(-longest // multiple) * multiple
    stages = tuple(
        _stage_memory(config, layout=layout, stage=stage, row_tokens=row_tokens, embedding_rows=embedding_rows)
        for stage in range(layout.pp)
    )
    return MemoryEstimate(layout, row_tokens, stages)


def _stage_memory(
    config: RunConfig, *, layout: Layout, stage: int, row_tokens: int, embedding_rows: int
) -> StageMemory:
    architecture = architecture_of(config.model)
    hidden, width = architecture.hidden_size, 2 if config.train.precision == "bf16" else 4
    count = stage_parameters(architecture, embedding_rows=embedding_rows, layout=layout, stage=stage)
    head = hidden if stage == layout.pp - 1 else 0
    shards = layout.dp * layout.cp if config.optimizer.use_distributed_optimizer else 1
    main_weights = 4 * (count - head) if width == 2 else 0
    fp8_layers = num_fp8_layers(config, pp=layout.pp, stage=stage)
    in_fp8 = fp8_layers * (architecture.layer_parameters // layout.tp)
    only_in_fp8 = in_fp8 if config.train.fp8_param_gather else 0

    tokens = row_tokens // layout.cp
    block = config.train.recompute_num_layers if config.train.recompute == "full" else 0
    in_flight = passes_in_flight(config, layout=layout, stage=stage)
    activations = in_flight * tokens * _chunk_activations(config, layout=layout, stage=stage)
    # A block of layers in bf16 keeps more than one in FP8, and blocks come one after the other.
    all_in_fp8 = fp8_layers == layers_per_chunk(architecture, layout=layout) * (layout.vpp or 1)
    recomputed = tokens * block * layer_activations(config, layout=layout, in_fp8=all_in_fp8)
    buffers = tokens * _buffers(architecture, layout=layout, width=width, in_fp8=fp8_layers > 0)
    buffers += width * _largest_weight(architecture, layout=layout, stage=stage, embedding_rows=embedding_rows)
    saving = 0
    if config.optimizer.use_distributed_optimizer:
        bucket = _largest_bucket(config, layout=layout, stage=stage, embedding_rows=embedding_rows)
        saving = max(8 * bucket + -(-4 * bucket // shards), 2 * only_in_fp8)
    return StageMemory(
        stage=stage,
        num_parameters=count,
        in_flight=in_flight,
        weights=width * (count - head - only_in_fp8) + 4 * head,
        fp8_weights=WEIGHT_BYTES * in_fp8,
        gradients=4 * count,
        optimizer=-(-(main_weights + 8 * count) // shards),
        activations=activations,
        recomputed=recomputed,
        buffers=buffers,
        saving=saving,
        runtime=RUNTIME_BYTES + int(FRAGMENTATION * (activations + recomputed + buffers)),
    )


def _largest_weight(architecture: Architecture, *, layout: Layout, stage: int, embedding_rows: int) -> int:
    """Numbers in the largest tensor of a rank: gate and up of a layer, or the embedding."""
    rows = max(2 * architecture.ffn_hidden_size, embedding_rows if stage == 0 else 0)
    return rows // layout.tp * architecture.hidden_size


def _largest_bucket(config: RunConfig, *, layout: Layout, stage: int, embedding_rows: int) -> int:
    """Weights in the largest of the buckets into which megatron-core's DDP divides a model chunk; where it cuts, the
    most there can be."""
    architecture = architecture_of(config.model)
    chunks = dataclasses.replace(architecture, num_layers=architecture.num_layers // (layout.vpp or 1))
    chunk = stage_parameters(chunks, embedding_rows=embedding_rows, layout=layout, stage=stage)
    if stage == layout.pp - 1 and config.train.precision == "bf16":
        chunk -= architecture.hidden_size  # the reward head is fp32, and a bucket has one type
    if stage > 0 or not config.optimizer.overlap_grad_reduce:
        return chunk
    largest = _largest_weight(architecture, layout=layout, stage=stage, embedding_rows=embedding_rows)
    return min(chunk, max(40_000_000, 1_000_000 * layout.dp) + largest)


def layer_activations(config: RunConfig, *, layout: Layout, in_fp8: bool = False) -> int:
    """Bytes that one layer keeps for its backward pass, a token of this rank (the second table above, and that of
    fp8.py)."""
    a, t, p = architecture_of(config.model), layout.tp, layout.tp if layout.sequence_parallel else 1
    width = 2 if config.train.precision == "bf16" else 4
    queries = width * a.num_attention_heads * a.kv_channels // t
    keys = width * a.num_query_groups * a.kv_channels // t
    copies = config.data.candidates_per_comparison if config.data.layout == "shared_prefix" else 1
    residual_and_norms = (4 * width * a.hidden_size + 8) // p
    if config.train.recompute == "selective":
        attention = queries + keys + (queries + 2 * keys)
    else:
        attention = queries + 2 * copies * keys + 4 * a.num_attention_heads // t
    attention += queries * (2 if layout.cp > 1 else 1)  # its output
    mlp = 3 * width * a.ffn_hidden_size // t
    masks = 2 * a.hidden_size // p if config.model.hidden_dropout > 0 else 0
    qk_norms = queries + keys if a.qk_layernorm else 0
    change = round(change_of_activations(config, tp=t, shards_of_residual=p)) if in_fp8 else 0
    return residual_and_norms + attention + mlp + masks + qk_norms + change


def _chunk_activations(config: RunConfig, *, layout: Layout, stage: int) -> int:
    """Bytes that one micro-batch leaves on one model chunk of a stage, a token of this rank. Of an interleaved pipeline
    the chunk with the most layers in bf16."""
    architecture, p = architecture_of(config.model), layout.tp if layout.sequence_parallel else 1
    row = (2 if config.train.precision == "bf16" else 4) * architecture.hidden_size // p
    layers = layers_per_chunk(architecture, layout=layout)
    is_full, block = config.train.recompute == "full", config.train.recompute_num_layers
    in_stage = architecture.num_layers // layout.pp
    in_bf16 = min(layers, in_stage - num_fp8_layers(config, pp=layout.pp, stage=stage))
    layer, fp8_layer = (layer_activations(config, layout=layout, in_fp8=in_fp8) for in_fp8 in (False, True))
    kept = -(-layers // block) * row if is_full else in_bf16 * layer + (layers - in_bf16) * fp8_layer
    final_norm = row if stage == layout.pp - 1 else 0
    output = row if layout.pp > 1 else 0
    return kept + 4 * architecture.kv_channels + final_norm + output


def _buffers(architecture: Architecture, *, layout: Layout, width: int, in_fp8: bool) -> int:
    p = layout.tp if layout.sequence_parallel else 1
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size // layout.tp
    return width * (2 * ffn + 2 * hidden + hidden // p) + (4 * ffn if in_fp8 else 0)


def layers_per_chunk(architecture: Architecture, *, layout: Layout) -> int:
    """Layers of one model chunk: all those of a stage, but for interleaved pipelines."""
    return architecture.num_layers // (layout.pp * (layout.vpp or 1))


def passes_in_flight(config: RunConfig, *, layout: Layout, stage: int) -> int:
    """Forward passes of a chunk whose backward pass is still to come, at most, on a pipeline stage.

    A rank has at most one micro-batch for each of its comparisons; fewer and larger ones change nothing here.
    """
    micro_batches = max(1, -(-config.train.global_batch_size // layout.dp))
    if layout.vpp is None:
        return min(layout.pp - stage, micro_batches)
    micro_batches = -(-micro_batches // layout.pp) * layout.pp
    warm_up = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp
    return min(warm_up + 1, micro_batches * layout.vpp)
