"""Rewards for texts from a checkpoint: the model of training, the text path of training, prefixes shared between
outputs."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_polar import log
from megatron_polar.config.load import load_saved_config
from megatron_polar.config.presets import architecture_of
from megatron_polar.config.schema import ModelSection, ParallelSection, RunConfig
from megatron_polar.config.validate import check_layout
from megatron_polar.convert.hugging_face import HuggingFaceModel, config_of, is_hugging_face, open_model
from megatron_polar.convert.load import load_hugging_face
from megatron_polar.data.loader import row_shape
from megatron_polar.data.packing import join_rewards, split_candidates
from megatron_polar.data.steps import lay_out
from megatron_polar.data.template import (
    WRAPPERS,
    Half,
    TokenizedComparison,
    assemble_comparison,
    encode_half,
    fitting_response_length,
)
from megatron_polar.data.tokenizer import Tokenizer, load_tokenizer
from megatron_polar.errors import UserError
from megatron_polar.model.build import BuiltModel, build_model
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import Device, select_device
from megatron_polar.parallel.topology import Topology
from megatron_polar.score.requests import ScoreRequest
from megatron_polar.train.checkpoint import agree_on_checkpoint
from megatron_polar.train.checkpoint_files import read_state
from megatron_polar.train.state_dict import load_weights
from megatron_polar.train.step import compute_rewards


@dataclass(frozen=True)
class TokenizedRequest:
    """A request in tokens: output i is candidate places[i][1] of comparison places[i][0].

    Outputs with which the same part of the prompt has room share a comparison; a reward does not depend on what else
    is asked. `truncated[i]`: what output i is scored with was cut (the prompt, the reference or itself).
    """

    comparisons: tuple[TokenizedComparison, ...]
    places: tuple[tuple[int, int], ...]
    truncated: tuple[bool, ...]

    def sequence(self, index: int) -> np.ndarray:
        """All token ids [t] that output `index` is scored with."""
        number, candidate = self.places[index]
        comparison = self.comparisons[number]
        return np.concatenate((comparison.prefix, comparison.candidates[candidate]))

    def length(self, index: int) -> int:
        """Tokens of output `index`, with its prefix."""
        number, candidate = self.places[index]
        comparison = self.comparisons[number]
        return len(comparison.prefix) + len(comparison.candidates[candidate])

    def in_order(self, rewards: Sequence[Sequence[float]]) -> list[float]:
        """Rewards of the comparisons' candidates as rewards of the outputs. Outputs of the same tokens, of which a cut
        may have left no difference, get the same one: rounding would order them."""
        first: dict[bytes, float] = {}
        return [
            first.setdefault(self.sequence(i).tobytes(), rewards[number][candidate])
            for i, (number, candidate) in enumerate(self.places)
        ]


class HalfMemo:
    """Halves of the prompt that was encoded last: requests for its further references ask for the same outputs."""

    def __init__(self, encode: Callable[[str, str, str, int], Half], count: Callable[[str], int]):
        self._encode, self._count = encode, count
        self._prompt: str | None = None

    def half(self, prompt: str, text: str, wrapper: str) -> Half:
        if prompt != self._prompt:
            self._prompt, self._length, self._halves = prompt, self._count(prompt), {}
        key = text, wrapper
        if key not in self._halves:
            self._halves[key] = self._encode(prompt, text, wrapper, self._length)
        return self._halves[key]


class Scorer:
    """A loaded reward model. Every rank of the job calls `score` with the same requests and gets all rewards.

    With tensor or pipeline parallelism the ranks work on one model together; the others (data-parallel) share the
    requests between them. `wrapper` is what the model was trained with, "" where that is not known.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        model: BuiltModel,
        tokenizer: Tokenizer,
        topology: Topology,
        device: Device,
        max_response_length: int,
        checkpoint: Path,
        wrapper: str,
    ):
        self.checkpoint, self.wrapper = checkpoint, wrapper
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.topology, self.device = topology, device
        self.max_response_length = fitting_response_length(max_response_length, config.data.max_sequence_length)
        self.control = tokenizer.control
        self.outputs_cut = 0
        """Outputs scored so far of which, with their prompt and reference, not all tokens were seen; against several
        references an output counts once for each."""
        self._shape = row_shape(config.data, topology=topology, architecture=model.architecture)

    def default_wrapper(self, given: str | None) -> str:
        """The wrapper of texts that name none: the one that the user gives, else the model's own, else sft. Says which
        it is, and warns where the first two differ."""
        own = self.wrapper
        if given and own and given != own and log.is_first_rank():
            log.warn(f"--wrapper {given}: {self.checkpoint} was trained with {own}, so its rewards will be others")
        chosen = given or own or WRAPPERS[0]
        reason = "as --wrapper says" if given else "as in training" if own else "training's is not known"
        log.info(f"wrapper of texts that name none: {chosen} ({reason})")
        return chosen

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """Rewards of each request's outputs, in order; higher means closer to the reference's policy."""
        memo = self.memo()
        tokenized = [self.tokenize(request, memo=memo) for request in requests]
        flat = iter(self.score_tokens([comparison for request in tokenized for comparison in request.comparisons]))
        self.outputs_cut += sum(sum(request.truncated) for request in tokenized)
        return [request.in_order([next(flat) for _ in request.comparisons]) for request in tokenized]

    def score_tokens(self, comparisons: Sequence[TokenizedComparison]) -> list[list[float]]:
        """Rewards of each comparison's candidates, in order; what they share with their prefix is computed once.

        A row holds at most `data.max_tokens_per_micro_batch` tokens, or one candidate with its prefix.
        """
        shape = self._shape
        parts = [split_candidates(c, max_tokens=shape.max_tokens, layout=shape.layout) for c in comparisons]
        return join_rewards(parts, self._score_rows([piece for pieces in parts for piece in pieces]))

    def _score_rows(self, comparisons: Sequence[TokenizedComparison]) -> list[list[float]]:
        if not comparisons:
            return []
        rows = lay_out(comparisons, shape=self._shape, rank=self.topology.dp_rank, pad_id=self.control.pad_id)
        rewards = compute_rewards(
            self.model, micro_batches=rows.micro_batches, topology=self.topology, device=self.device
        )
        mine = {}
        for members, batch, values in zip(rows.members, rows.micro_batches, rewards, strict=True):
            pieces = values.split(batch.candidate_counts.tolist())
            mine |= {index: piece.tolist() for index, piece in zip(members, pieces, strict=True)}
        everyone = [mine]
        if self.topology.dp_size > 1:
            everyone = [None] * self.topology.dp_size
            dist.all_gather_object(everyone, mine, group=self.topology.groups.dp)
        found = {index: values for part in everyone for index, values in part.items()}
        return [found[index] for index in range(len(comparisons))]

    def memo(self) -> HalfMemo:
        """What saves work over several calls of `tokenize`, of one thread."""

        def encode(prompt: str, text: str, wrapper: str, prompt_length: int) -> Half:
            return encode_half(
                self.tokenizer,
                prompt=prompt,
                trajectory=text,
                wrapper=wrapper,
                max_response_length=self.max_response_length,
                prompt_length=prompt_length,
            )

        return HalfMemo(encode, lambda prompt: len(self.tokenizer.encode(prompt)))

    def tokenize(self, request: ScoreRequest, *, memo: HalfMemo | None = None) -> TokenizedRequest:
        """A request's tokens, cut as in training. Raises UserError for texts that cannot be made to fit."""
        memo = memo or self.memo()
        reference, *outputs = (
            memo.half(request.prompt, text, request.wrapper) for text in (request.reference, *request.outputs)
        )
        together = self._assemble(reference, outputs)
        cuts = [0] * len(outputs)
        if together.prompt_tokens_cut:
            cuts = [self._assemble(reference, [output]).prompt_tokens_cut for output in outputs]
        groups = {cut: [i for i, other in enumerate(cuts) if other == cut] for cut in dict.fromkeys(cuts)}
        comparisons = tuple(self._assemble(reference, [outputs[i] for i in members]) for members in groups.values())
        places = {i: (n, k) for n, members in enumerate(groups.values()) for k, i in enumerate(members)}
        truncated = tuple(
            cut + reference.response_tokens_cut + output.response_tokens_cut > 0
            for cut, output in zip(cuts, outputs, strict=True)
        )
        return TokenizedRequest(comparisons, tuple(places[i] for i in range(len(outputs))), truncated)

    def _assemble(self, reference: Half, outputs: Sequence[Half]) -> TokenizedComparison:
        return assemble_comparison(
            reference,
            outputs,
            levels=(0,) * len(outputs),
            control=self.control,
            max_length=self.config.data.max_sequence_length,
        )


def load_scorer(
    checkpoint: str | Path, *, parallel: ParallelSection | None = None, device_kind: str = "auto"
) -> Scorer:
    """Load a run directory's newest complete checkpoint, one step of it, or a Hugging Face directory; `parallel`
    defaults to one rank a model.

    The tokenizer and the configuration are the checkpoint's own, but for `train.fp8`: scoring is in `train.precision`;
    and Transformer Engine, where training insisted on it, is used where it is there.
    Raises UserError when there is none that verifies.
    """
    parallel = parallel or ParallelSection()
    device = select_device(device_kind, local_rank=ranks.local_rank())
    topology = ranks.initialize(parallel, device=device)
    ranks.seed_layers(0)
    source = open_model(checkpoint) if is_hugging_face(checkpoint) else None
    if source is None:
        directory = agree_on_checkpoint(checkpoint, topology=topology).path
        config = load_saved_config(directory / "config.yaml")
        tokenizer = load_tokenizer(directory / "tokenizer")
    else:
        directory, config, tokenizer = source.directory, _config_of(source), load_tokenizer(checkpoint)
    run = dataclasses.replace(config.run, device=device_kind)
    # Checkpoints hold bf16 or fp32, whatever the GEMMs of training were in; and FP8 would tie a reward to its batch.
    train = dataclasses.replace(config.train, fp8="off", fp8_param_gather=False)
    config = dataclasses.replace(config, parallel=parallel, run=run, train=train, model=_layers_of_here(config.model))
    check_layout(parallel, architecture_of(config.model))
    if source is not None:
        source.check_tokenizer(tokenizer, where=checkpoint)
    model = build_model(config, topology=topology, device=device, vocab_size=tokenizer.vocab_size, for_training=False)
    if source is None:
        load_weights(directory, model=model)
    else:
        load_hugging_face(source, model=model)
    log.info(f"scoring with {directory} ({model.transformer_impl} layers, {model.attention}) on {device.name}")
    trained = source or read_state(directory)
    return Scorer(
        config=config,
        model=model,
        tokenizer=tokenizer,
        topology=topology,
        device=device,
        checkpoint=directory,
        max_response_length=trained.max_response_length,
        wrapper=trained.wrapper,
    )


def _layers_of_here(model: ModelSection) -> ModelSection:
    impl = "auto" if model.transformer_impl == "transformer_engine" else model.transformer_impl
    attention = "auto" if model.attention == "te" else model.attention
    return dataclasses.replace(model, transformer_impl=impl, attention=attention)


def _config_of(source: HuggingFaceModel) -> RunConfig:
    if not source.has_head:
        named = source.config["architectures"][0]
        raise UserError(f"{source.directory}: {named} has no reward head, so it cannot score; train one from it first")
    return config_of(source, run_directory=str(source.directory), dtype=source.dtype)
