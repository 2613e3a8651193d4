"""Layouts that `megatron-polar plan --search` finds: POLAR's sizes on 8 to 4096 H100, and Megatron-LM's published ones.

Arithmetic, not measurement: megatron_polar/scaling/step_time.py says what is assumed. Batches and sequence lengths are
those of the examples. Of the paper's pre-training data it is known that prompts have 1 to 1,024 tokens, and that prompt
and answer have some 1,640 together (6.55 thousand for the two sequences of a triple); that prompts are uniform, with a
mean of 512, is an assumption.
"""

import argparse
import sys
from pathlib import Path

from megatron_polar.config.load import load_config
from megatron_polar.config.presets import padded_vocab_size
from megatron_polar.scaling.plan import Cluster
from megatron_polar.scaling.search import Candidate, search_layouts
from megatron_polar.scaling.step_time import Lengths, Work, mean_work

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIZES = {"1.8B": "pretrain_1_8b", "7B": "pretrain_7b", "20B": "pretrain_20b", "72B": "pretrain_72b"}
GPUS = (8, 32, 128, 512, 1024, 4096)
LENGTHS = Lengths(prompt=512.0, answer=1126.0)
# Megatron-LM's README: layers, hidden size, FFN width (of SwiGLU, with as many weights), heads; GPUs, TP, PP, MFU.
PUBLISHED = {
    "1.7B": ((24, 2048, 8192, 16), 48, 1, 1, 0.41),
    "7.1B": ((30, 4096, 11008, 32), 96, 2, 1, 0.47),
    "16B": ((32, 6144, 16384, 48), 192, 4, 1, 0.49),
}


def main() -> None:
    """Print both tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("# Layouts by estimate\n")
    print("`python benchmarks/plan.py`; arithmetic, with the shares of the peaks that one H200 reached, and with")
    print("`optimizer.overlap_grad_reduce` and `overlap_param_gather`. How the ranks of a pipeline wait for each other")
    print("at every send, and loading, are not in it (docs/performance.md). H100 of 80 GB, nodes of eight; prompts of")
    print(f"{LENGTHS.prompt:.0f} and answers of {LENGTHS.answer:.0f} tokens (the paper's sum), K = 2, shared prefixes.")
    print("Row tokens are what to configure; GB counts the longest comparison that the examples allow, which may be")
    print("longer. A layout with a pipeline is taken where it is faster by more than a tenth.\n")
    print("| model | GPUs | TP | PP x chunks | DP | recompute | row tokens | GB | s/step | comparisons/s | MFU |")
    print("|---|---:|---:|---|---:|---|---:|---:|---:|---:|---:|")
    work = mean_work(LENGTHS, candidates=2, layout="shared_prefix")
    for name, example in SIZES.items():
        config = load_config(EXAMPLES / f"{example}.yaml")
        vocabulary = padded_vocab_size(config.model.vocab_size or 92544, multiple=128)
        for gpus in GPUS:
            found = search_layouts(
                config, cluster=Cluster(gpus // 8, 8, 80.0), work=work, embedding_rows=vocabulary, most=1
            )
            print(_row(name, gpus, found[0] if found else None))
    print("\nAgainst the layouts of Megatron-LM's README. Sequences have 4096 tokens; its batches are not given there,")
    print("and 16 sequences a data-parallel rank are assumed:\n")
    print("| model | GPUs | published | MFU | found first | MFU of the published one by estimate |")
    print("|---|---:|---|---:|---|---:|")
    for name in PUBLISHED:
        print(_published_row(name))


def _row(name: str, gpus: int, one: Candidate | None) -> str:
    if one is None:
        return f"| {name} | {gpus} | does not fit | | | | | | | | |"
    layout, config = one.layout, one.config
    return (
        f"| {name} | {gpus} | {layout.tp} | {layout.pp} x {layout.vpp or 1} | {layout.dp} | {config.train.recompute} "
        f"| {config.data.max_tokens_per_micro_batch} | {one.memory.largest.total / 1e9:.0f} | {one.time.seconds:.3g} "
        f"| {config.train.global_batch_size / one.time.seconds:,.0f} | {one.time.mfu:.0%} |"
    )


def _published_row(name: str) -> str:
    shape, gpus, tp, pp, mfu = PUBLISHED[name]
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    model = [f"model.{key}={value}" for key, value in zip(names, shape, strict=True)]
    config = load_config(
        EXAMPLES / "pretrain_7b.yaml",
        ["model.preset=null", "model.rotary_base=1e4", *model, f"model.num_query_groups={shape[3]}",
         f"train.global_batch_size={16 * gpus // tp}", "data.max_tokens_per_micro_batch=8192",
         "data.max_sequence_length=4096"],
    )  # fmt: skip
    whole = Work(4096, 4096**2 / 2, rewards=4096, reward_keys=4096**2 / 2)  # of a language model
    cluster = Cluster(gpus // 8, 8, 80.0)
    found = search_layouts(config, cluster=cluster, work=whole, embedding_rows=32000, longest_response=1000, most=100)
    best = ", ".join(f"TP{c.layout.tp} PP{c.layout.pp}{f'x{c.layout.vpp}' if c.layout.vpp else ''}" for c in found[:3])
    same = next(c for c in found if (c.layout.tp, c.layout.pp) == (tp, pp))
    return f"| {name} | {gpus} | TP{tp} PP{pp} | {mfu:.0%} | {best} | {same.time.mfu:.0%} |"


if __name__ == "__main__":
    sys.exit(main())
