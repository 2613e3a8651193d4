"""The verbs that bring models in, out and online: convert and serve. Part of cli.py."""

import argparse
import math
import os
from pathlib import Path

from megatron_polar.errors import UserError
from megatron_polar.outputs import check_output_directory


def add_wrapper(verb, *, of: str) -> None:
    """The option of verbs that score: None is the model's own wrapper."""
    verb.add_argument(
        "--wrapper",
        choices=("sft", "pretrain"),
        help=f"for {of} that name none (default: what the model was trained with, else sft)",
    )


# --- convert ---------------------------------------------------------------------------------------------------------


def add_convert(verbs) -> None:
    from megatron_polar.convert.families import LAYOUTS

    verb = verbs.add_parser("convert", help="checkpoints in and out of Hugging Face's formats")
    ways = verb.add_subparsers(title="directions", required=True, metavar="from-hf|to-hf", dest="way")
    way = ways.add_parser("from-hf", help="a Hugging Face directory to a checkpoint that training starts from")
    way.add_argument("--model", type=Path, required=True, help="directory with config.json and *.safetensors")
    way.add_argument("--output", type=Path, required=True, help="run directory that gets checkpoints/step_00000000")
    way.add_argument("--head", choices=("load", "init"), help="the reward head (default: load it if there is one)")
    way.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights (default: the model's; fp32 for fp16)")
    way.add_argument("--tokenizer", type=Path, help="tokenizer's file or directory (default: the model's)")
    way.add_argument("--separator-token", help="control token between the halves (default: POLAR's <|reward|>)")
    way.add_argument("--reward-token", help="control token of the reward (default: POLAR's [UNUSED_TOKEN_130])")
    way.add_argument("--verify", action="store_true", help="compare rewards with transformers' on sample texts")
    way.set_defaults(run=_from_hf)
    way = ways.add_parser("to-hf", help="a checkpoint to a directory for transformers, vLLM, SGLang and LMDeploy")
    way.add_argument("--checkpoint", type=Path, required=True, help="run directory, or one step of it")
    way.add_argument("--output", type=Path, required=True, help="directory to make")
    way.add_argument("--layout", choices=LAYOUTS, required=True)
    way.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of the weights (default: the checkpoint's)")
    way.add_argument("--max-shard-size-gb", type=float, default=2.0, help="largest file, in GiB")
    way.add_argument("--verify", action="store_true", help="compare rewards with transformers' on sample texts")
    way.set_defaults(run=_to_hf)


def _hide_gpus(options: argparse.Namespace) -> None:
    """Both models are compared on the CPU; before torch looks for GPUs."""
    if options.verify:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _from_hf(options: argparse.Namespace) -> int:
    _hide_gpus(options)
    from megatron_polar.convert.convert import from_hf

    check_output_directory(options.output)
    checkpoint = from_hf(
        options.model,
        output=options.output,
        head=options.head,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        separator_token=options.separator_token,
        reward_token=options.reward_token,
        needs_head=options.verify,
    )
    if options.verify:
        from megatron_polar.score.verify_export import verify_conversion

        return verify_conversion(checkpoint, options.model, with_texts=False)
    return 0


def _to_hf(options: argparse.Namespace) -> int:
    _hide_gpus(options)
    from megatron_polar.convert.convert import to_hf
    from megatron_polar.train.checkpoint_files import find_checkpoint

    check_output_directory(options.output)
    if not 0 < options.max_shard_size_gb < math.inf:
        raise UserError(f"--max-shard-size-gb {options.max_shard_size_gb} must be a number above 0")
    max_bytes = int(options.max_shard_size_gb * 2**30)
    checkpoint = find_checkpoint(options.checkpoint)  # once: a run may save another while this one is written
    to_hf(
        checkpoint,
        output=options.output,
        layout=options.layout,
        dtype=options.dtype,
        max_shard_bytes=max_bytes,
    )
    if options.verify:
        from megatron_polar.score.verify_export import verify_conversion

        return verify_conversion(checkpoint, options.output, with_texts=True)
    return 0


# --- serve -----------------------------------------------------------------------------------------------------------


def add_serve(verbs) -> None:
    from dataclasses import fields

    from megatron_polar.serve.limits import Limits

    verb = verbs.add_parser("serve", help="rewards over HTTP from a checkpoint")
    verb.add_argument("--checkpoint", type=Path, required=True, help="run directory, one step of it, or a HF directory")
    verb.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    verb.add_argument("--host", default="127.0.0.1", help="address to listen on; others than this want a token")
    verb.add_argument("--port", type=int, default=8000, help="0: any free one, which is printed")
    verb.add_argument("--token-file", type=Path, help="file with the bearer token (or: MEGATRON_POLAR_API_KEY)")
    verb.add_argument("--model-name", help="what replies call the model (default: the directory's name)")
    add_wrapper(verb, of="items")
    verb.add_argument("--pooling-shape", choices=("vllm", "lmdeploy"), default="vllm", help="whose /pooling to answer")
    for limit in fields(Limits):
        name = f"--{limit.name.replace('_', '-')}"
        verb.add_argument(name, type=type(limit.default), default=limit.default, help=limit.metadata["help"])
    verb.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> None:
    from dataclasses import fields
    from functools import partial

    from megatron_polar.score.scorer import load_scorer
    from megatron_polar.serve.application import ServeOptions
    from megatron_polar.serve.limits import Limits
    from megatron_polar.serve.server import serve
    from megatron_polar.serve.shapes import Settings
    from megatron_polar.serve.token import TOKEN_VARIABLE, read_token

    limits = Limits(**{limit.name: vars(options)[limit.name] for limit in fields(Limits)})
    settings = Settings(
        model=options.model_name or options.checkpoint.resolve().name,
        wrapper=options.wrapper,
        max_items=limits.max_items,
        max_text_bytes=limits.max_text_bytes,
        pooling_shape=options.pooling_shape,
    )
    token = read_token(options.token_file, variable=TOKEN_VARIABLE)
    load = partial(load_scorer, options.checkpoint, device_kind=options.device)
    serve(load, ServeOptions(settings, limits, host=options.host, port=options.port, token=token))
