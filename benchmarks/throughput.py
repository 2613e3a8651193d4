"""Training throughput of POLAR's shapes on one GPU: tokens, comparisons and FLOP/s, memory, and where the time goes.

Real optimizer steps on rows of the length mix of layouts.py; each precision in a process of its own. With AdamW's fp32
state a 7B model does not fit one GPU, so `--layers` takes fewer: a layer costs the same in any depth, and the embedding
is a look-up. FP8 recipes and bf16 can be run in turns in one call. "GB" is the peak that torch allocated, "planned"
what scaling/memory.py expects of it: the plan's sum without what torch does not see (CUDA, NCCL) or does not count
(fragmentation). MFU counts, per physical token, 6 FLOPs per weight of the layers (in the last layer, behind its keys
and values, per reward), and attention over its exact causal area; over the dense bf16 peak, for FP8 too.

  python benchmarks/throughput.py --preset polar_7b --layers 12 --fp8 off tensorwise
"""

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import numpy as np
import torch
from arguments import positive
from layouts import VOCAB_SIZE, draw
from trainer import Trainer, conditions, constant_rate

from megatron_polar.config.presets import PRESETS, architecture_of
from megatron_polar.config.schema import DataSection, DatasetSource, ModelSection, RunConfig, RunSection, TrainSection
from megatron_polar.data.packing import MicroBatch
from megatron_polar.errors import USER_ERROR
from megatron_polar.scaling.hardware import GPUS
from megatron_polar.scaling.memory import estimate_memory, layout_of
from megatron_polar.scaling.step_time import Work, estimate_step_time
from megatron_polar.train.metrics import peak_tflops


def main() -> int:
    """Measure every recipe and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="polar_1_8b")
    parser.add_argument("--layers", type=positive, help="fewer layers than the preset has")
    parser.add_argument(
        "--fp8",
        nargs="+",
        choices=("off", "tensorwise", "blockwise", "delayed"),
        default=["off"],
        help="recipes, in turn",
    )
    parser.add_argument(
        "--layouts", nargs="+", choices=("shared_prefix", "packed", "padded"), default=["shared_prefix", "packed"]
    )
    parser.add_argument("--candidates", type=positive, nargs="+", default=[2, 4], metavar="K")
    parser.add_argument("--row-tokens", type=positive, default=16384)
    parser.add_argument("--rows", type=positive, default=4, help="micro-batches of a step, about")
    parser.add_argument("--steps", type=positive, default=8, help="timed; two more come before them")
    parser.add_argument("--fp8-weights", action="store_true", help="train.fp8_param_gather with every FP8 recipe")
    parser.add_argument("--no-fusion", action="store_true", help="train.gradient_accumulation_fusion=false")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--profile", action="store_true", help="share of GPU time outside of GEMMs and attention")
    options = parser.parse_args()
    size = make_config(options, fp8="off", layout="packed", k=2).model
    if not torch.cuda.is_available() and (count := architecture_of(size).num_parameters(VOCAB_SIZE)) > 1e8:
        print(f"error: --preset {options.preset} has {count:.2g} weights, and there is no GPU here; to try the script: "
              "--preset nano --row-tokens 2048", file=sys.stderr)  # fmt: skip
        return USER_ERROR
    print(
        "| precision | K | layout | s/step | planned | comparisons/s | physical tokens/s | logical tokens/s | MFU | GB "
        "| planned | other |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for fp8 in options.fp8:
        # megatron-core's hooks keep a model alive; its memory comes back with the end of its process.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            where = pool.submit(measure_precision, options, fp8).result()
    shape = f"{options.preset}, {options.layers} layers" if options.layers else options.preset
    shape += "" if options.recompute == "none" else f", recompute {options.recompute}"
    print(
        f"\n{shape}, rows of {options.row_tokens} tokens, about {options.rows} a step, medians of {options.steps} "
        f"steps; GB: peak allocated; other: GPU time outside of GEMMs and attention; {where}."
    )
    return 0


def measure_precision(options: argparse.Namespace, fp8: str) -> str:
    """Print a row for every layout and K; returns the conditions."""
    trainer = None
    for k in options.candidates:
        for layout in options.layouts:
            config = make_config(options, fp8=fp8, layout=layout, k=k)
            trainer = trainer or Trainer(config, vocab_size=VOCAB_SIZE)
            trainer.take(config.data)
            print(measure(trainer, options, k=k, fp8=fp8), flush=True)
    where = conditions(trainer.device)
    torch.distributed.destroy_process_group()
    return where


def make_config(options: argparse.Namespace, *, fp8: str, layout: str, k: int) -> RunConfig:
    """bf16 on a GPU, fp32 on the CPU (for trying the script)."""
    has_gpu = torch.cuda.is_available()
    return RunConfig(
        run=RunSection(directory="unused"),
        model=ModelSection(preset=options.preset, num_layers=options.layers, reward_head_init_std=0.02),
        data=DataSection(
            train=(DatasetSource("unused"),),
            layout=layout,
            max_tokens_per_micro_batch=options.row_tokens,
            pad_to_multiple=128,
            candidates_per_comparison=k,
        ),
        train=TrainSection(
            global_batch_size=1,
            num_steps=1,
            precision="bf16" if has_gpu else "fp32",
            recompute=options.recompute,
            fp8=fp8,
            fp8_bf16_layers=0 if fp8 == "delayed" else 1,
            fp8_param_gather=options.fp8_weights and fp8 in ("tensorwise", "blockwise"),
            gradient_accumulation_fusion=False if options.no_fusion else "auto",
        ),
        optimizer=constant_rate(1e-5),
    )


def measure(trainer: Trainer, options: argparse.Namespace, *, k: int, fp8: str) -> str:
    """One row of the table."""
    generator = np.random.default_rng([0, k])
    mean = statistics.fmean(
        len(c.prefix) + sum(map(len, c.candidates)) for c in draw(k, count=64, generator=np.random.default_rng(1))
    )
    count = max(1, int(options.rows * options.row_tokens / mean))
    seconds, works, longest = [], [], 0
    for number in range(options.steps + 2):
        comparisons = draw(k, count=count, generator=generator)
        if number == 2:
            trainer.device.memory_allocated()  # forgets the peak so far
        _, rows, elapsed = trainer.step(comparisons)
        if number < 2:
            continue
        batches = rows.micro_batches
        seconds.append(elapsed)
        works.append(work_of(batches))
        longest = max(longest, *(batch.tokens.size for batch in batches))
    flops = [3 * trainer.model.architecture.forward_flops(**dataclasses.asdict(work)) for work in works]
    peak = peak_tflops(trainer.device.name, None)

    def rate(amounts: list[float]) -> float:
        return statistics.median(amount / second for amount, second in zip(amounts, seconds, strict=True))

    mfu = f"{rate(flops) / peak / 1e12:.1%}" if peak else "not known"
    memory, planned = trainer.device.memory_allocated() / 1e9, planned_bytes(trainer, longest=longest) / 1e9
    expected = "not known"  # of a CPU
    if peak:
        times = [planned_seconds(trainer, work, comparisons=count) for work in works]
        expected = f"{statistics.median(times):.3f}"
    precision = trainer.config.train.precision + ("" if fp8 == "off" else f", FP8 {fp8}")
    precision += " with FP8 weights" if trainer.config.train.fp8_param_gather else ""
    other = f"{share_outside(trainer, draw(k, count=count, generator=generator)):.0%}" if options.profile else ""
    return (
        f"| {precision} | {k} | {trainer.config.data.layout} | {statistics.median(seconds):.3f} | {expected} "
        f"| {rate([count] * len(seconds)):.1f} | {rate([work.tokens for work in works]):,.0f} "
        f"| {rate([work.reward_keys for work in works]):,.0f} | {mfu} | {memory:.1f} | {planned:.1f} | {other} |"
    )


def work_of(batches: Sequence[MicroBatch]) -> Work:
    """Of all micro-batches of a step together."""
    return Work(
        tokens=sum(batch.tokens.size for batch in batches),
        attended=sum(batch.num_attended for batch in batches),
        rewards=sum(len(batch.reward_positions) for batch in batches),
        reward_keys=sum(batch.num_logical_tokens for batch in batches),
    )


def planned_bytes(trainer: Trainer, *, longest: int) -> int:
    """Of what torch's allocator counts, with a longest row of so many tokens."""
    data = dataclasses.replace(trainer.config.data, max_tokens_per_micro_batch=longest, max_sequence_length=1)
    config = dataclasses.replace(trainer.config, data=data)
    stage = estimate_memory(config, world_size=1, embedding_rows=trainer.model.vocab_size, longest_response=1).largest
    return stage.states + stage.step


def planned_seconds(trainer: Trainer, work: Work, *, comparisons: int) -> float:
    """Of a step with this work; on another machine than an H100 or H200, of an H200."""
    gpu = next((gpu for name, gpu in GPUS.items() if name.upper() in trainer.device.name), GPUS["h200"])
    train = dataclasses.replace(trainer.config.train, global_batch_size=comparisons)
    config = dataclasses.replace(trainer.config, train=train)
    mean = Work(*(amount / comparisons for amount in dataclasses.astuple(work)))
    layout = layout_of(config.parallel, world_size=1)
    return estimate_step_time(
        config, layout=layout, work=mean, gpu=gpu, gpus_per_node=1, embedding_rows=trainer.model.vocab_size
    ).seconds


def share_outside(trainer: Trainer, comparisons) -> float:
    """Share of a step's GPU time in kernels that are neither GEMMs nor attention, by their names; the longest ones go
    to stderr."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        _, _, elapsed = trainer.step(comparisons)
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    print(f"kernels take {total / 1e6:.3f} s of a profiled step's {elapsed:.3f} s:", file=sys.stderr)
    for event in events[:30]:
        time = event.self_device_time_total
        print(f"{time / total:6.1%} {time / 1e3:9.2f} ms {event.count:6d} x {event.key[:150]}", file=sys.stderr)
    words = ("gemm", "nvjet", "cutlass", "flash", "fmha", "cudnn", "attention")
    inside = sum(e.self_device_time_total for e in events if any(word in e.key.lower() for word in words))
    return 1 - inside / total


if __name__ == "__main__":
    sys.exit(main())
