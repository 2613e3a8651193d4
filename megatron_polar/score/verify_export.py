"""Rewards of a checkpoint here and in transformers, of its export or of what it was made from, side by side."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_polar import log
from megatron_polar.convert.hugging_face import open_model
from megatron_polar.data.template import join_text
from megatron_polar.score.requests import ScoreRequest
from megatron_polar.score.scorer import Scorer, load_scorer

SAMPLES = (
    ScoreRequest(
        "What is the capital of China?", "Beijing.", ("Beijing.", "Shanghai.", "", "东京是日本的首都。"), "sft"
    ),
    ScoreRequest(
        "Once upon a time", " there was a king.", (" there was a queen.", "\n\n1. a list\n2. of two"), "pretrain"
    ),
    ScoreRequest("Count the r in strawberry.\n" * 20, "3", ("3", "2", "There are three: st(r)awbe(r)(r)y 🙂"), "sft"),
)
"""Texts of several lengths, scripts and wrappers."""


@dataclass(frozen=True)
class Side:
    """One output's reward here and there."""

    output: str
    here: float
    there: float

    @property
    def difference(self) -> float:
        return abs(self.here - self.there)


def compare_rewards(
    scorer: Scorer, export: Path, *, requests: Sequence[ScoreRequest] = SAMPLES, with_texts: bool = True
) -> list[Side]:
    """Score the token ids of `requests` with both. Warns when the export's tokenizer makes other ids of a text
    (`with_texts`)."""
    from transformers import PreTrainedTokenizerFast

    here = [reward for rewards in scorer.score(requests) for reward in rewards]
    fast = PreTrainedTokenizerFast.from_pretrained(export) if with_texts else None
    sequences, outputs = [], []
    for request in requests:
        tokenized = scorer.tokenize(request)
        for index, output in enumerate(request.outputs):
            ids = tokenized.sequence(index).tolist()
            sequences.append(ids)
            outputs.append(output)
            if fast and not tokenized.truncated[index] and fast(_text(scorer, request, output)).input_ids != ids:
                log.warn(
                    f"{export}: its tokenizer gives other ids than training for {output[:40]!r}; send ids to engines"
                )
    return [Side(*row) for row in zip(outputs, here, score_with_transformers(export, sequences), strict=True)]


def _text(scorer: Scorer, request: ScoreRequest, output: str) -> str:
    halves = [
        join_text(prompt=request.prompt, trajectory=text, wrapper=request.wrapper)
        for text in (request.reference, output)
    ]
    return scorer.tokenizer.separator_token.join(halves) + scorer.tokenizer.reward_token


@torch.no_grad()
def score_with_transformers(export: Path, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Rewards of token ids, each ending with the reward token's, by the export's model in one batch, padded left."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    if open_model(export).family.name == "InternLM2":
        from megatron_polar.convert.internlm2.modeling_internlm2 import InternLM2ForRewardModel as Model
    else:
        Model = AutoModelForSequenceClassification
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        # Of InternLM2's configuration, which keeps `rope_scaling` for engines with an older transformers.
        warnings.filterwarnings("ignore", "`rope_scaling` is deprecated", FutureWarning)
        model = Model.from_pretrained(export, dtype="auto").eval()
    width = max(map(len, sequences))
    if model.config.pad_token_id is None:  # of many language models; any other than the reward token's will do
        model.config.pad_token_id = 1 if sequences[0][-1] == 0 else 0
    pad = model.config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in sequences])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in sequences])
    return model(input_ids=ids, attention_mask=mask).logits.flatten().tolist()


def verify_conversion(checkpoint: Path, model: Path, *, with_texts: bool) -> int:
    """Compare a checkpoint with the Hugging Face directory `model` that it became, or was made from.

    Print the table and the largest difference; returns 1 when it is more than rounding explains, and when these
    rewards cannot tell: where they are not finite, or lie as close together as they may differ.
    """
    scorer = load_scorer(checkpoint, device_kind="cpu")
    sides = compare_rewards(scorer, model, with_texts=with_texts)
    for side in sides:
        log.info(f"  here {side.here:+.6f}  transformers {side.there:+.6f}  {side.output[:40]!r}")
    largest = max(side.difference for side in sides)
    is_fp32 = open_model(model).dtype == torch.float32 and scorer.config.train.precision == "fp32"
    allowed = 1e-4 if is_fp32 else 0.05
    rewards = [reward for side in sides for reward in (side.here, side.there)]
    spread = max(rewards) - min(rewards)
    if not all(map(math.isfinite, rewards)):
        verdict = "not all are finite: do not use what was written"
    elif spread == 0:
        verdict = "all are equal (is the reward head zero?), so nothing is verified"
    elif largest > min(allowed, spread / 4):
        verdict = f"more than {allowed:g} or a quarter of their spread of {spread:.2g}: do not use what was written"
    else:
        verdict = "as close as rounding allows"
    log.info(f"largest difference of {len(sides)} rewards: {largest:.2g}, {verdict}")
    return 0 if verdict == "as close as rounding allows" else 1
