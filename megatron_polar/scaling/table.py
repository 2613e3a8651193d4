"""A plan as text: parameters, layout, memory by term, data, and what the paper's laws suggest."""

import dataclasses
from collections.abc import Sequence

from megatron_polar.config.presets import architecture_of
from megatron_polar.scaling.laws import FEWEST_TOKENS, SIZES, Sizes, batch_size, peak_learning_rate
from megatron_polar.scaling.memory import MemoryEstimate, usable_bytes
from megatron_polar.scaling.plan import GB, Plan, plural
from megatron_polar.scaling.search import Candidate

_NARROW = 1024  # hidden size below which launches of kernels are spoken of; assumed, not measured
_HOST_BYTES_PER_PARAMETER = 12  # docs/training.md: what every rank gathers to save


def render_plan(plan: Plan, *, base_tokens: float | None = None, reward_tokens: float | None = None) -> str:
    """The table that `megatron-polar plan` prints; GB are 10^9 bytes.

    `base_tokens` and `reward_tokens` are for the laws, as in laws.py; default: the preset's base model, and what the
    datasets hold.
    """
    lines = _model_lines(plan)
    if plan.memory is not None and not plan.is_on_cpu:
        lines += _memory_lines(plan, memory=plan.memory)
        lines += _time_lines(plan)
    lines += _data_lines(plan)
    lines += _law_lines(plan, base_tokens=base_tokens, reward_tokens=reward_tokens)
    return "\n".join(lines)


def _row(name: str, text: str) -> str:
    return f"{name:<8}{text}"


def _model_lines(plan: Plan) -> list[str]:
    config, parallel, layout, rows = plan.config, plan.config.parallel, plan.layout, plan.embedding_rows
    lines = []
    if rows is not None:
        whole = short(architecture_of(config.model).num_parameters(rows))
        is_known = config.model.vocab_size or (plan.paths and plan.paths.vocab_size)
        assumed = "" if is_known else " (assumed: InternLM2's vocabulary)"
        precision = config.train.precision + ("" if config.train.fp8 == "off" else f" with FP8 {config.train.fp8}")
        lines.append(_row("model", f"{whole} parameters, {precision}; embedding of {rows} rows{assumed}"))
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp, batch = parallel.virtual_pipeline_model_parallel_size, config.train.global_batch_size
    sizes = f"TP {tp}{' with SP' if parallel.sequence_parallel else ''} x PP {pp}{f' in {vpp} chunks' if vpp else ''}"
    sizes += f" x CP {parallel.context_parallel_size}{f' x DP {layout.dp}' if layout else ''}"
    lines.append(_row("layout", f"{plan.place}: {sizes}"))
    if not plan.is_on_cpu and plan.cluster.gpus_per_node % tp:
        lines.append(
            _row("", "note: tensor-parallel groups reach over nodes: slow; take a TP that divides a node's GPUs")
        )
    if layout is not None:
        each = batch / layout.dp
        lines.append(_row("batch", f"{batch} comparisons a step, {each:.1f} a data-parallel rank"))
        if pp > 1 and each < 4 * pp:
            lines.append(_row("", "note: less than 4 comparisons a rank and stage, so the pipeline will often wait"))
    return lines


def _memory_lines(plan: Plan, *, memory: MemoryEstimate) -> list[str]:
    config, cluster, largest, layout = plan.config, plan.cluster, memory.largest, memory.layout
    asked = config.data.max_tokens_per_micro_batch
    row = f"rows of {memory.row_tokens} tokens"
    if memory.row_tokens >= asked + config.data.pad_to_multiple * layout.tp * layout.cp:
        known = plan.paths and plan.paths.longest_response
        row += f" (for the longest comparison {'of this data' if known else 'that is accepted'}; asked for: {asked})"
    usable, gpu = usable_bytes(cluster.gpu_bytes) / GB, f"{cluster.gpu_memory_gb:g}"
    verdict = "fits" if memory.fits(cluster.gpu_bytes) else "does not fit"
    lines = [
        _row("memory", f"of a GPU of pipeline stage {largest.stage} of {layout.pp}, in GB; arithmetic, not measured"),
        _row("", f"{short(largest.num_parameters)} parameters; {row}; recompute {config.train.recompute}"),
        *(_row("", f"{value / GB:8.2f}  {name}") for name, value in _terms(plan, memory=memory) if value),
        _row("", f"{largest.total / GB:8.2f}  in all; {usable:.1f} of {gpu} may be used: {verdict}"),
    ]
    if layout.pp > 1:
        lines.append(_row("", f"all stages: {', '.join(f'{stage.total / GB:.1f}' for stage in memory.stages)}"))
    if config.optimizer.use_distributed_optimizer:
        most = max(stage.num_parameters for stage in memory.stages)
        host = most * _HOST_BYTES_PER_PARAMETER * cluster.gpus_per_node / GB
        lines.append(_row("host", f"{host:.0f} GB of a node's own memory while a checkpoint is saved"))
    return lines


def _time_lines(plan: Plan) -> list[str]:
    time, lengths = plan.time, plan.lengths
    names = (field.name for field in dataclasses.fields(time) if field.name != "mfu")
    shares = {name: getattr(time, name) / time.seconds for name in names}
    spent = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in shares.items() if share >= 0.005)
    comparisons = plan.config.train.global_batch_size / time.seconds
    of = f"prompts of {lengths.prompt:.0f} and answers of {lengths.answer:.0f} tokens"
    lines = [
        _row("time", f"{time.seconds:.3g} s a step on {plan.cluster.gpu.name}, for {of}; arithmetic, not measured"),
        _row("", f"{comparisons:.3g} comparisons/s, MFU {time.mfu:.0%}; {spent}"),
    ]
    if architecture_of(plan.config.model).hidden_size < _NARROW:
        lines.append(_row("", "note: launches of kernels are left out here; so narrow a model may well wait for them"))
    if plan.are_lengths_assumed:
        lines.append(_row("", "these lengths are assumed; give your own by --prompt-tokens and --answer-tokens"))
    if plan.num_steps:
        hours = plan.num_steps * time.seconds / 3600
        whole = f"{hours / 24:.3g} days" if hours >= 48 else f"{hours:.3g} hours"
        of = f"{plan.num_steps:,} steps, {short(hours * plan.cluster.num_gpus)} GPU-hours"
        lines.append(_row("", f"{whole} for {of}"))
    return lines


def render_search(found: Sequence[Candidate]) -> str:
    """The table of `megatron-polar plan --search`, and what to write behind the YAML for the first row."""
    if not found:
        return "search: nothing fits; take more or larger GPUs, or shorter sequences"
    lines = ["search  the fastest layouts that fit, by the same arithmetic", ""]
    head = ("TP", "PP", "chunks", "CP", "DP", "recompute", "row tokens", "GB", "s/step", "comparisons/s", "MFU")
    rows = [head]
    for one in found:
        layout, train, data = one.layout, one.config.train, one.config.data
        sizes = (layout.tp, layout.pp, layout.vpp or 1, layout.cp, layout.dp)
        speed = (f"{one.time.seconds:.3g}", f"{train.global_batch_size / one.time.seconds:.3g}", f"{one.time.mfu:.0%}")
        memory = f"{one.memory.largest.total / GB:.1f}"
        rows.append((*map(str, sizes), train.recompute, str(data.max_tokens_per_micro_batch), memory, *speed))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if any(one.layout.pp > 1 for one in found):
        lines += [
            "",
            "a pipeline stands where a tenth more time would put it, for waits that the estimate leaves out; none was",
            "measured on GPUs: try it before a long run (docs/performance.md)",
        ]
    return "\n".join([*lines, "", f"the first of them: {found[0].overrides}"])


def _terms(plan: Plan, *, memory: MemoryEstimate) -> list[tuple[str, int]]:
    config, largest, layout = plan.config, memory.largest, memory.layout
    shards = layout.dp * layout.cp if config.optimizer.use_distributed_optimizer else 1
    state = "fp32 weights and AdamW's moments" if config.train.precision == "bf16" else "AdamW's moments"
    passes = plural(largest.in_flight, "micro-batch").replace("batchs", "batches")
    chunks = " x chunk" if layout.vpp else ""
    of_a_step = [
        (f"activations kept, {passes}{chunks} in flight", largest.activations),
        (f"activations recomputed, {plural(config.train.recompute_num_layers, 'layer')} at a time", largest.recomputed),
        ("buffers of the backward pass", largest.buffers),
    ]
    of_a_save = [(f"gathered at a save, when {largest.step / GB:.2f} of a training step are gone", largest.saving)]
    return [
        (f"weights, {config.train.precision}", largest.weights),
        ("weights in FP8, and their transposes", largest.fp8_weights),
        ("gradients, fp32", largest.gradients),
        (f"{state}, over {plural(shards, 'rank')}", largest.optimizer),
        *(of_a_step if largest.step >= largest.saving else of_a_save),
        ("CUDA, NCCL, workspaces, fragmentation (assumed)", largest.runtime),
    ]


def _data_lines(plan: Plan) -> list[str]:
    lines = [] if plan.paths else [_row("data", "not looked at (--no-paths)")]
    for facts in (*plan.paths.train, *plan.paths.validation) if plan.paths else ():
        stored = f"{short(facts.num_tokens)} tokens, answers up to {facts.longest_response}"
        lines.append(_row("" if lines else "data", f"{facts.path}: {facts.num_comparisons:,} comparisons, {stored}"))
    if plan.num_steps is not None:
        batch, epochs = plan.config.train.global_batch_size, ""
        if plan.num_comparisons:
            passes = plan.num_steps * batch / plan.num_comparisons
            epochs = f" = {passes:.3g} epochs" + (": every prompt is seen again" if passes >= 2 else "")
        lines.append(_row("steps", f"{plan.num_steps:,} of {batch} comparisons{epochs}"))
    return lines or [_row("data", "none could be read")]


def _law_lines(plan: Plan, *, base_tokens: float | None, reward_tokens: float | None) -> list[str]:
    """Learning rate and batch that the paper's laws suggest for pre-training, beside the configured ones."""
    config, train = plan.config, plan.paths.train if plan.paths else ()
    if any(facts.num_preferences for facts in train):
        return [_row("laws", "none: the paper's are for pre-training, and this data holds preferences")]
    is_given = base_tokens is not None or reward_tokens is not None
    if reward_tokens is None and train and plan.num_steps:
        # A sequence of a comparison has two halves: prompt with reference, prompt with candidate.
        mean_half = sum(facts.num_tokens for facts in train) / sum(facts.num_halves for facts in train)
        comparisons = plan.num_steps * config.train.global_batch_size
        reward_tokens = comparisons * 2 * config.data.candidates_per_comparison * mean_half
    if not reward_tokens:
        return [
            _row("laws", "for pre-training; `megatron-polar plan` takes --reward-tokens where there is no data yet")
        ]
    if not is_given and reward_tokens < FEWEST_TOKENS:
        return [_row("laws", f"none: they were fitted on billions of tokens, and this is {short(reward_tokens)}")]
    preset = SIZES.get(config.model.preset or "")
    base_tokens = base_tokens or (preset.base_tokens if preset else None)
    parameters = preset.parameters if preset else architecture_of(config.model).num_parameters(plan.embedding_rows or 0)
    sizes = Sizes(parameters, base_tokens=base_tokens or 1.0, reward_tokens=reward_tokens)
    base = f"{short(base_tokens)}" if base_tokens else "unknown (`megatron-polar plan` takes --base-tokens)"
    given = f"{short(parameters)} parameters, {short(reward_tokens)} tokens, base model's tokens {base}"
    lines = [
        _row("laws", f"for {given}:"),
        _row("", f"batch {batch_size(sizes):.0f} comparisons; configured: {config.train.global_batch_size}"),
    ]
    if base_tokens:
        rate = f"{peak_learning_rate(sizes):.3g}"
        lines.append(_row("", f"peak learning rate {rate}; configured: {config.optimizer.lr:.3g}"))
    return lines


def short(number: float) -> str:
    """Three digits and a decimal prefix: 1.70B, 3.60T."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:#.3g}{letter}".replace(f".{letter}", letter)
    return f"{number:.0f}"
