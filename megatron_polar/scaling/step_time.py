"""How long a step takes, by arithmetic: compute, communication, pipeline bubbles, imbalance.

A model of a machine. The shares of peaks that kernels reach are those of one H200 (benchmarks/gpu_h200.md), whose steps
come out within 6 %; Megatron-LM's published MFU at 1.7B, 7.1B and 16B, on H100s, comes out within 3 % at batches that
had to be assumed (tests/test_step_time.py allows more). Links, bubbles and imbalance are arithmetic that no machine of
ours has checked.

- GEMMs: FLOPs of the rows (config/presets.py) over GEMM_SHARE of the peak; forward once, backward twice, and forward
  once more with full recomputation. Attention: its exact causal area, over ATTENTION_SHARE of the peak.
- With `train.fp8` the GEMMs of its layers take FP8's peak, and casts add bytes (fp8.py); communication within layers is
  counted as in bf16.
- Norms, SwiGLU, residuals, RoPE: the bytes that they read and write, over MEMORY_SHARE of the memory's bandwidth.
- TP: forward an all-gather and a reduce-scatter for attention and for the MLP each, backward an all-gather more, of
  which a third is not overlapped; over NVLink inside a node, else over the network. CP: all-to-alls of queries, keys,
  values and outputs.
- PP: (P - 1) / V of a micro-batch's time of bubble, and two sends for each micro-batch and chunk.
- DP: reduce-scatter of fp32 gradients and all-gather of weights, less what `overlap_grad_reduce` and
  `overlap_param_gather` hide behind one micro-batch's backward and forward pass. A group that leaves the node uses the
  network adapters of all its members there, one a GPU. Optimizer: the bytes of its state.
- Imbalance: of Karmarkar-Karp, by ranks and comparisons a rank, as benchmarks/balance.py finds it.
"""

import math
from dataclasses import dataclass

import numpy as np

from megatron_polar.config.presets import Architecture, architecture_of
from megatron_polar.config.schema import RunConfig
from megatron_polar.scaling.fp8 import FP8_GEMM_SHARES, bytes_of_casts, num_fp8_layers
from megatron_polar.scaling.hardware import Gpu
from megatron_polar.scaling.memory import Layout, stage_parameters

GEMM_SHARE = 0.70
ATTENTION_SHARE = 0.19
"""Over many segments of some hundred to some thousand tokens, forward and backward; of long sequences it is more."""
MEMORY_SHARE = 0.40
"""So little, because what is counted (`_bytes_moved`) leaves out casts, copies and sums between kernels."""
LINK_SHARE = 0.75
"""Of NVLink's and the network's bandwidth, in collectives of megabytes."""
IMBALANCE_COMPARISONS = (1, 1.5, 2, 4, 8, 16)
IMBALANCE = {
    2: (0.221, 0.152, 0.054, 0.013, 0.002, 0.0),
    8: (0.676, 0.242, 0.109, 0.026, 0.004, 0.0),
    64: (1.586, 0.773, 0.314, 0.067, 0.025, 0.005),
    512: (2.251, 1.157, 0.803, 0.102, 0.030, 0.012),
}
"""By data-parallel ranks and by comparisons a rank: the heaviest rank's work over the mean, less one
(benchmarks/balance.md)."""


@dataclass(frozen=True)
class Work:
    """A comparison's mean work in the row layout: physical tokens, pairs inside the mask, rewards and their keys."""

    tokens: float
    attended: float
    rewards: float
    reward_keys: float


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of an answer. The default is the mix of the benchmarks."""

    prompt: float = 325.0
    answer: float = 400.0


def mean_work(lengths: Lengths, *, candidates: int, layout: str) -> Work:
    """Work of a comparison of mean lengths: prefix = prompt, reference, prompt again; K candidates."""
    prompt, answer = lengths.prompt, lengths.answer
    prefix, reward_keys = 2 * prompt + answer + 1, candidates * (2 * prompt + 2 * answer + 2)
    if layout == "shared_prefix":
        attended = prefix**2 / 2 + candidates * (prefix * answer + answer**2 / 2)
        return Work(prefix + candidates * (answer + 1), attended, candidates, reward_keys)
    sequence = prefix + answer + 1
    return Work(candidates * sequence, candidates * sequence**2 / 2, candidates, reward_keys)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by where they go; `mfu` over the physical FLOPs without recomputation."""

    compute: float
    tensor_parallel: float
    context_parallel: float
    pipeline_bubble: float
    pipeline_sends: float
    data_parallel: float
    optimizer: float
    imbalance: float
    mfu: float

    @property
    def seconds(self) -> float:
        return (
            self.compute + self.tensor_parallel + self.context_parallel + self.pipeline_bubble + self.pipeline_sends
            + self.data_parallel + self.optimizer + self.imbalance
        )  # fmt: skip


def estimate_step_time(
    config: RunConfig, *, layout: Layout, work: Work, gpu: Gpu, gpus_per_node: int, embedding_rows: int
) -> StepTime:
    """Seconds of a step of `train.global_batch_size` comparisons."""
    architecture = architecture_of(config.model)
    own = config.train.global_batch_size / layout.dp
    tokens = own * work.tokens
    num_micro_batches = max(1.0, tokens / config.data.max_tokens_per_micro_batch)
    if layout.vpp:
        num_micro_batches = max(num_micro_batches, layout.pp)
    links = _Links(gpu, gpus_per_node=gpus_per_node, layout=layout)
    passes = 4 if config.train.recompute == "full" else 3
    compute = passes * _forward_seconds(config, architecture, layout=layout, work=work, comparisons=own, gpu=gpu)
    tensor, context = _layer_communication(config, architecture, layout=layout, links=links, tokens=tokens)
    per_micro_batch = (compute + tensor + context) / num_micro_batches
    bubble = (layout.pp - 1) / (layout.vpp or 1) * per_micro_batch
    parameters = max(
        stage_parameters(architecture, embedding_rows=embedding_rows, layout=layout, stage=stage)
        for stage in {0, layout.pp - 1}
    )
    flops = 3 * config.train.global_batch_size * _flops(architecture, work)
    base = compute + tensor + context + bubble
    times = {
        "compute": compute,
        "tensor_parallel": tensor,
        "context_parallel": context,
        "pipeline_bubble": bubble,
        "pipeline_sends": _sends(config, architecture, layout=layout, links=links, tokens=tokens),
        "data_parallel": _data_parallel(config, layout, links, parameters=parameters, micro_batch=per_micro_batch),
        "optimizer": _optimizer(config, layout, parameters=parameters, gpu=gpu),
        "imbalance": _imbalance(own, ranks=layout.dp) * base,
    }
    peak = layout.world_size * gpu.peak_tflops * 1e12
    return StepTime(**times, mfu=flops / sum(times.values()) / peak)


def _flops(architecture: Architecture, work: Work) -> float:
    return architecture.forward_flops(
        tokens=work.tokens, attended=work.attended, rewards=work.rewards, reward_keys=work.reward_keys
    )


def _forward_seconds(
    config: RunConfig, architecture: Architecture, *, layout: Layout, work: Work, comparisons: float, gpu: Gpu
) -> float:
    """Of one rank: its share of the layers by tensor, pipeline and context parallelism."""
    ranks = layout.tp * layout.pp * layout.cp
    gemms = _flops(architecture, Work(work.tokens, 0, work.rewards, 0))
    attention = _flops(architecture, work) - gemms
    peak = gpu.peak_tflops * 1e12 * (1 if config.train.precision == "bf16" else 0.5)
    fp8_share = _fp8_layers(config, layout) / architecture.num_layers
    seconds_per_flop = (1 - fp8_share) / (GEMM_SHARE * peak)
    if fp8_share:
        seconds_per_flop += fp8_share / (FP8_GEMM_SHARES[config.train.fp8] * gpu.fp8_peak_tflops * 1e12)
    seconds = comparisons / ranks * (gemms * seconds_per_flop + attention / (ATTENTION_SHARE * peak))
    return seconds + comparisons * work.tokens * _bytes_moved(config, architecture, layout) / (
        gpu.memory_gb_s * 1e9 * MEMORY_SHARE
    )


def _bytes_moved(config: RunConfig, architecture: Architecture, layout: Layout) -> float:
    """By everything but GEMMs and attention, for a token and one pass over a rank's layers: two norms and two residual
    additions read and write the residual stream five times, SwiGLU reads two widths and writes one, RoPE reads and
    writes queries and keys."""
    a, element = architecture, 2 if config.train.precision == "bf16" else 4
    hidden = 10 * a.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    heads = 2 * (a.num_attention_heads + a.num_query_groups) * a.kv_channels / layout.tp
    per_layer = element * (hidden + 3 * a.ffn_hidden_size / layout.tp + heads)
    fp8_layers = _fp8_layers(config, layout)
    casts = fp8_layers * bytes_of_casts(a, recipe=config.train.fp8, tp=layout.tp) if fp8_layers else 0.0
    return (a.num_layers * per_layer + casts) / layout.pp / layout.cp


def _fp8_layers(config: RunConfig, layout: Layout) -> int:
    return sum(num_fp8_layers(config, pp=layout.pp, stage=stage) for stage in range(layout.pp))


class _Links:
    """Bandwidths between the ranks of each kind of group, in bytes a second. Ranks are laid out as Megatron does it:
    TP next to each other, then CP, then DP, then PP."""

    def __init__(self, gpu: Gpu, *, gpus_per_node: int, layout: Layout):
        inside, outside = (speed * 1e9 * LINK_SHARE for speed in (gpu.nvlink_gb_s, gpu.network_gb_s))

        def of(span: int) -> float:
            return inside if gpus_per_node % span == 0 else outside

        self.tp = of(layout.tp)
        self.cp = of(layout.tp * layout.cp)
        # Gradients and weights go over data- and context-parallel ranks, rings of NCCL over every adapter in a node.
        # The node with the fewest members of a group sets the pace.
        span = layout.tp * layout.cp * layout.dp
        neighbours = max(1, math.gcd(span, gpus_per_node) // layout.tp)
        self.dp = max(of(span), min(inside, neighbours * outside))
        self.pp = of(layout.world_size)


def _layer_communication(
    config: RunConfig, architecture: Architecture, *, layout: Layout, links: _Links, tokens: float
) -> tuple[float, float]:
    """Seconds of tensor- and of context-parallel communication of a step, on one rank."""
    element = 2 if config.train.precision == "bf16" else 4
    layers, own_tokens = architecture.num_layers / layout.pp, tokens / layout.cp
    row = element * architecture.hidden_size * own_tokens * (layout.tp - 1) / layout.tp
    again = 4 if config.train.recompute == "full" else 0  # the forward pass once more
    tensor = layers * (4 + 2 + again) * row / links.tp  # of six backward, four run beside GEMMs of weight gradients
    heads = (
        2 * (architecture.num_attention_heads + architecture.num_query_groups) * architecture.kv_channels / layout.tp
    )
    exchanged = element * heads * own_tokens * (layout.cp - 1) / layout.cp
    context = layers * (2 + again / 4) * exchanged / links.cp
    return tensor, context


def _sends(config: RunConfig, architecture: Architecture, *, layout: Layout, links: _Links, tokens: float) -> float:
    if layout.pp == 1:
        return 0.0
    element = 2 if config.train.precision == "bf16" else 4
    row = element * architecture.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    return 2 * (layout.vpp or 1) * tokens / layout.cp * row / links.pp


def _data_parallel(config: RunConfig, layout: Layout, links: _Links, *, parameters: int, micro_batch: float) -> float:
    """`fp8_param_gather` halves what is gathered of FP8 layers; all layers are counted as such here."""
    ranks = layout.dp * layout.cp
    if ranks == 1:
        return 0.0
    share = (ranks - 1) / ranks / links.dp
    weight = 1 if config.train.fp8_param_gather else 2 if config.train.precision == "bf16" else 4
    reduce, gather = 4 * parameters * share, weight * parameters * share
    if config.optimizer.overlap_grad_reduce:
        reduce = max(0.0, reduce - micro_batch * 2 / 3)
    if config.optimizer.overlap_param_gather:
        gather = max(0.0, gather - micro_batch / 3)
    return reduce + gather


def _optimizer(config: RunConfig, layout: Layout, *, parameters: int, gpu: Gpu) -> float:
    """AdamW reads gradient, weight and two moments, and writes three of them, in fp32."""
    shards = layout.dp * layout.cp if config.optimizer.use_distributed_optimizer else 1
    return 28 * parameters / shards / (gpu.memory_gb_s * 1e9 * MEMORY_SHARE)


def _imbalance(comparisons: float, *, ranks: int) -> float:
    """Heaviest rank over the mean, less one, between the points of IMBALANCE and at its ends; below one comparison a
    rank the heaviest has one, as there."""
    if ranks == 1:
        return 0.0
    by_ranks = [
        np.interp(math.log(comparisons), [math.log(count) for count in IMBALANCE_COMPARISONS], row)
        for row in IMBALANCE.values()
    ]
    found = float(np.interp(math.log(ranks), [math.log(count) for count in IMBALANCE], by_ranks))
    return min((1 + found) / min(comparisons, 1.0), ranks) - 1
