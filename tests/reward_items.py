"""What the client's tests score, and the token ids that an engine must be sent for it."""

import pytest

from megatron_polar.data.template import assemble_comparison, encode_half
from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.serve.client import RewardClient, RewardError, RewardItem

ITEMS = [RewardItem(f"ba ke {i // 3}", f"li mo {i // 3}", f"nu ra {i}") for i in range(50)]


def sequence_of(tokenizer_path, item: RewardItem, *, max_length=16384, max_response_length=4096) -> list[int]:
    """Token ids of an item, straight from the template."""
    tokenizer = load_tokenizer(tokenizer_path)
    halves = [
        encode_half(
            tokenizer,
            prompt=item.prompt,
            trajectory=text,
            wrapper=item.wrapper or "sft",
            max_response_length=max_response_length,
        )
        for text in (item.reference, item.output)
    ]
    made = assemble_comparison(halves[0], halves[1:], levels=(0,), control=tokenizer.control, max_length=max_length)
    return [*made.prefix.tolist(), *made.candidates[0].tolist()]


def refused(client: RewardClient, items=ITEMS) -> RewardError:
    with pytest.raises(RewardError) as caught:
        client.score(items)
    assert "\n" not in str(caught.value)
    return caught.value
