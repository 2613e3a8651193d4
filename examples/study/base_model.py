"""Train a small causal language model (Llama's shape) with transformers: the base model that reward models start from.

base_model.py TEXT.jsonl --tokenizer FILE.model --output DIR --hidden-size 128 --num-layers 2 --num-tokens 1000000

TEXT.jsonl has a document a line, {"text": ...}. The output is a Hugging Face directory for `convert from-hf`, with
`training.json` beside the weights: tokens, seconds and the loss on documents that were set aside.

Matrices of the layers are trained with Muon, all else with AdamW: models this small learn to copy from their context,
which is what matching builds on, in half of the tokens that AdamW alone takes (docs/log.md).
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HELD_OUT_SHARE = 0.02
CLIP_NORM = 1.0
LOG_EVERY = 50
MUON_LR_FACTOR = 5.0
"""Muon's peak learning rate over AdamW's."""
FINAL_RATE = 0.1


def parser() -> argparse.ArgumentParser:
    """The options; sizes are in Llama's words, lengths in tokens."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("text", type=Path, metavar="TEXT.jsonl")
    options.add_argument("--tokenizer", type=Path, required=True)
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--hidden-size", type=int, required=True)
    options.add_argument("--num-layers", type=int, required=True)
    options.add_argument("--ffn-hidden-size", type=int, required=True)
    options.add_argument("--num-heads", type=int, required=True)
    options.add_argument("--num-query-groups", type=int, required=True)
    options.add_argument("--num-tokens", type=int, required=True, help="tokens to train on; documents are reused")
    options.add_argument("--context", type=int, default=256)
    options.add_argument("--batch", type=int, default=4, help="contexts a step")
    options.add_argument("--lr", type=float, default=4e-3, help="AdamW's peak; Muon's is five times it")
    options.add_argument("--max-positions", type=int, default=4096)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--device", default="cpu")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and save; returns the exit status."""
    options = parser().parse_args(arguments)
    import torch

    from megatron_polar import log
    from megatron_polar.data.tokenizer import load_tokenizer

    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")  # on GPUs; weights and sums stay fp32
    tokenizer = load_tokenizer(options.tokenizer)
    rows, held_out = read_rows(options.text, tokenizer, context=options.context, seed=options.seed)
    model = build_model(options, tokenizer).to(options.device)
    num_steps = max(1, options.num_tokens // (options.batch * options.context))
    started = time.monotonic()
    with log.Progress(f"base model {options.output.name}", total=num_steps, unit="steps") as bar:
        losses = train(model, rows, num_steps=num_steps, options=options, bar=bar)
    report = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "non_embedding_parameters": sum(w.numel() for name, w in model.named_parameters() if "model.layers" in name),
        "tokens": num_steps * options.batch * options.context,
        "tokens_in_text": int(rows.numel()),
        "seconds": time.monotonic() - started,
        "training_loss": sum(losses[-LOG_EVERY:]) / len(losses[-LOG_EVERY:]),
        "held_out_loss": mean_loss(model, held_out, options=options),
    }
    model.save_pretrained(options.output)
    tokenizer.save(options.output)
    (options.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    log.info(f"{options.output}: {json.dumps(report)}")
    return 0


def read_rows(path: Path, tokenizer, *, context: int, seed: int):
    """Encode the documents in random order, one behind the other with BOS between, as rows [r, context] of ids.

    Returns rows to train on and rows of documents that were set aside.
    """
    import torch

    from megatron_polar.data.lines import read_jsonl

    texts = [json.loads(line)["text"] for _, line in read_jsonl(path)]
    random.Random(seed).shuffle(texts)
    first = max(1, round(HELD_OUT_SHARE * len(texts)))
    found = []
    for part in (texts[first:], texts[:first]):
        ids = [id for text in part for id in (tokenizer.bos_id, *tokenizer.encode(text))]
        ids += [tokenizer.bos_id] * (-len(ids) % context)
        found.append(torch.tensor(ids).view(-1, context))
    return found


def build_model(options: argparse.Namespace, tokenizer):
    """A random Llama with untied embeddings; every matrix starts with a standard deviation of 1/sqrt(hidden)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=options.hidden_size,
            intermediate_size=options.ffn_hidden_size,
            num_hidden_layers=options.num_layers,
            num_attention_heads=options.num_heads,
            num_key_value_heads=options.num_query_groups,
            max_position_embeddings=options.max_positions,
            rms_norm_eps=1e-5,
            initializer_range=options.hidden_size**-0.5,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.bos_id,
            pad_token_id=tokenizer.pad_id,
        )
    )


def train(model, rows, *, num_steps: int, options: argparse.Namespace, bar) -> list[float]:
    """Train with warm-up and a linear decay to a tenth; every row is used once before any is used again.

    Returns the loss of every step.
    """
    import torch

    optimizers = build_optimizers(model, lr=options.lr)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: rate(step, num_steps)) for one in optimizers]
    generator = torch.Generator().manual_seed(options.seed)
    order, losses = torch.empty(0, dtype=torch.long), []
    model.train()
    for _ in range(num_steps):
        while len(order) < options.batch:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        batch, order = rows[order[: options.batch]].to(options.device), order[options.batch :]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for one in (*optimizers, *schedules):
            one.step()
        model.zero_grad()
        losses.append(loss.item())
        bar.advance()
    return losses


def build_optimizers(model, *, lr: float) -> list:
    """Muon for the layers' matrices, AdamW for embedding, output matrix and norms."""
    import torch

    inside, outside = [], []
    for name, weight in model.named_parameters():
        (inside if weight.ndim == 2 and ".layers." in name else outside).append(weight)
    return [
        torch.optim.Muon(inside, lr=MUON_LR_FACTOR * lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(outside, lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
    ]


def rate(step: int, num_steps: int) -> float:
    """Share of the peak learning rate at `step`."""
    warm_up = max(1, num_steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 1 - (1 - FINAL_RATE) * (step - warm_up) / max(1, num_steps - warm_up)


def mean_loss(model, rows, *, options: argparse.Namespace) -> float:
    """Mean loss of a token, in nats."""
    import torch

    model.eval()
    with torch.inference_mode():
        losses = [float(model(input_ids=b, labels=b).loss) * len(b) for b in rows.to(options.device).split(16)]
    return sum(losses) / len(rows)


if __name__ == "__main__":
    sys.exit(main())
