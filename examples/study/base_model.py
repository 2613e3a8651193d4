"""Train a small causal language model (Llama's shape) with transformers: the base model that reward models start from.

base_model.py TEXT.jsonl --tokenizer FILE.model --output DIR --hidden-size 128 --num-layers 2 --num-tokens 1000000

TEXT.jsonl has a document a line, {"text": ...}. The output is a Hugging Face directory for `convert from-hf`, with
`training.json` beside the weights: tokens, seconds and the loss on documents that were set aside.

A document has a row to itself, padded: rows that are packed cut documents in two and show what others say, and models
this small need twice the tokens to learn from them what to copy (docs/log.md).

Matrices of the layers are trained with Muon, all else with AdamW: models this small learn to copy from their context,
which is what matching builds on, in half of the tokens that AdamW alone takes (docs/log.md).
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HELD_OUT_SHARE = 0.02
CLIP_NORM = 1.0
LOG_EVERY = 50
MUON_LR_FACTOR = 5.0
"""Muon's peak learning rate over AdamW's."""
FIRST_RATE, FINAL_RATE = 0.02, 0.1
"""Of the peak."""
WARM_UP_SHARE = 0.05
SORTED_AT_ONCE = 512
"""Documents that are sorted by length before they are put into batches."""
NO_LABEL = -100


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
    options.add_argument("--context", type=int, default=384, help="where documents are cut")
    options.add_argument("--batch-tokens", type=int, default=1024, help="tokens a step at most, with padding")
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
    from megatron_polar.errors import USER_ERROR, UserError

    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")  # on GPUs; weights and sums stay fp32
    tokenizer = load_tokenizer(options.tokenizer)
    try:
        documents, held_out = read_documents(options.text, tokenizer, context=options.context, seed=options.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    model = build_model(options, tokenizer).to(options.device)
    started = time.monotonic()
    with log.Progress(f"base model {options.output.name}", total=options.num_tokens, unit="tokens") as bar:
        losses, num_tokens = train(model, documents, options=options, bar=bar)
    report = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "non_embedding_parameters": sum(w.numel() for name, w in model.named_parameters() if "model.layers" in name),
        "tokens": num_tokens,
        "tokens_in_text": sum(map(len, documents)),
        "steps": len(losses),
        "seconds": time.monotonic() - started,
        "training_loss": sum(losses[-LOG_EVERY:]) / len(losses[-LOG_EVERY:]),
        "held_out_loss": mean_loss(model, held_out, options=options),
    }
    model.save_pretrained(options.output)
    tokenizer.save(options.output)
    (options.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    log.info(f"{options.output}: {json.dumps(report)}")
    return 0


def read_documents(path: Path, tokenizer, *, context: int, seed: int):
    """Encode the documents in random order, BOS before and behind, cut to `context` ids.

    Returns documents to train on and documents that were set aside, each a vector of ids. UserError for fewer than two.
    """
    import torch

    from megatron_polar.data.lines import read_jsonl
    from megatron_polar.errors import UserError

    texts = [json.loads(line)["text"] for _, line in read_jsonl(path)]
    if len(texts) < 2:
        raise UserError(f"{path}: {len(texts)} documents; two are needed, one to train on and one to set aside")
    random.Random(seed).shuffle(texts)
    bos = tokenizer.bos_id
    documents = [torch.tensor([bos, *tokenizer.encode(text), bos][:context]) for text in texts]
    first = max(1, round(HELD_OUT_SHARE * len(documents)))
    return documents[first:], documents[:first]


def batches(documents: Sequence, *, max_tokens: int, rng: random.Random) -> Iterator[list]:
    """Every document once, in random order: those of like length together, `max_tokens` at most with their padding.

    A document that is longer than that is a batch of its own.
    """
    order = rng.sample(range(len(documents)), len(documents))
    found: list[list] = []
    for start in range(0, len(order), SORTED_AT_ONCE):
        pool = sorted((documents[i] for i in order[start : start + SORTED_AT_ONCE]), key=len)
        batch: list = []
        for document in pool:  # each is the longest so far
            if batch and (len(batch) + 1) * len(document) > max_tokens:
                found.append(batch)
                batch = []
            batch.append(document)
        found.append(batch)
    rng.shuffle(found)
    yield from found


def padded(batch: Sequence, *, device: str = "cpu"):
    """Ids and labels [b, s] of documents; ids are padded with zeros, which nothing before them can see, and labels
    with what transformers leaves out of the loss."""
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence(list(batch), batch_first=True)
    labels = pad_sequence(list(batch), batch_first=True, padding_value=NO_LABEL)
    return ids.to(device), labels.to(device)


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


def train(model, documents: Sequence, *, options: argparse.Namespace, bar) -> tuple[list[float], int]:
    """Train with warm-up and a linear decay to a tenth; every document is read once before any is read again.

    Returns the loss of every step, and the tokens read, without padding.
    """
    import torch

    optimizers = build_optimizers(model, lr=options.lr)
    peaks = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    rng = random.Random(options.seed)
    losses: list[float] = []
    num_tokens = 0
    model.train()
    epochs = (batches(documents, max_tokens=options.batch_tokens, rng=rng) for _ in itertools.count())
    for batch in itertools.chain.from_iterable(epochs):
        if num_tokens >= options.num_tokens:
            break
        ids, labels = padded(batch, device=options.device)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for group, peak in peaks:
            group["lr"] = peak * rate(num_tokens / options.num_tokens)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
        read = sum(map(len, batch))
        num_tokens += read
        bar.advance(read)
    return losses, num_tokens


def build_optimizers(model, *, lr: float) -> list:
    """Muon for the layers' matrices, AdamW for embedding, output matrix and norms."""
    import torch
    from muon import Muon

    inside, outside = [], []
    for name, weight in model.named_parameters():
        (inside if weight.ndim == 2 and ".layers." in name else outside).append(weight)
    return [
        Muon(inside, lr=MUON_LR_FACTOR * lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(outside, lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
    ]


def rate(done: float) -> float:
    """Share of the peak learning rate where this share of the tokens has been read."""
    if done < WARM_UP_SHARE:
        return max(FIRST_RATE, done / WARM_UP_SHARE)
    return 1 - (1 - FINAL_RATE) * min(1.0, (done - WARM_UP_SHARE) / (1 - WARM_UP_SHARE))


def mean_loss(model, documents: Sequence, *, options: argparse.Namespace) -> float:
    """Mean loss of a token, in nats."""
    import torch

    model.eval()
    total = 0.0
    with torch.inference_mode():
        for batch in batches(documents, max_tokens=options.batch_tokens, rng=random.Random(0)):
            ids, labels = padded(batch, device=options.device)
            total += float(model(input_ids=ids, labels=labels).loss) * sum(len(document) - 1 for document in batch)
    return total / sum(len(document) - 1 for document in documents)


if __name__ == "__main__":
    sys.exit(main())
