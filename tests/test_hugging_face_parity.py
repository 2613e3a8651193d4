"""The same weights in Hugging Face's LlamaForSequenceClassification and here give the same rewards."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_layouts import VOCAB_SIZE, make_config, random_comparisons

from megatron_polar.data.packing import build_micro_batch
from megatron_polar.model.build import build_model
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import select_device
from megatron_polar.train.step import compute_rewards


def rewards_here_and_there(num_query_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of this package's shared-prefix rows, and of transformers, one plain sequence at a time."""
    import dataclasses

    config = make_config("unused", parallel={})
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, num_query_groups=num_query_groups, init_method_std=0.05)
    )
    device = select_device("cpu", local_rank=0)
    topology = ranks.initialize(config.parallel, device=device)
    ranks.seed_ranks(topology, seed=1)
    model = build_model(config, topology=topology, device=device, vocab_size=VOCAB_SIZE, for_training=False)
    comparisons = random_comparisons(4)
    batch = build_micro_batch(comparisons, layout="shared_prefix", pad_id=0, pad_to_multiple=16)
    here = compute_rewards(model, micro_batches=[batch], topology=topology, device=device)[0]
    llama = llama_with_weights_of(model, config=config)
    with torch.no_grad():
        there = [
            llama(torch.from_numpy(np.concatenate([c.prefix, candidate]).astype(np.int64))[None]).logits.item()
            for c in comparisons
            for candidate in c.candidates
        ]
    return here.numpy(), np.array(there)


def llama_with_weights_of(model, *, config):
    """transformers' model with our weights copied into it."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    shape, core = model.architecture, model.cores[0]
    llama = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
            head_dim=shape.kv_channels,
            rms_norm_eps=shape.layernorm_epsilon,
            rope_theta=shape.rotary_base,
            max_position_embeddings=512,
            num_labels=1,
            pad_token_id=model.vocab_size - 1,
        )
    ).eval()
    weights = dict(core.named_parameters())
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "score.weight": weights["output_layer.weight"],
    }
    d, groups = shape.kv_channels, shape.num_query_groups
    for i in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        # Megatron's linear_qkv interleaves by key/value group: [q..q, k, v] of each.
        qkv = weights[ours + "self_attention.linear_qkv.weight"].view(groups, -1, d, shape.hidden_size)
        state[theirs + "self_attn.q_proj.weight"] = qkv[:, :-2].reshape(-1, shape.hidden_size)
        state[theirs + "self_attn.k_proj.weight"] = qkv[:, -2].reshape(-1, shape.hidden_size)
        state[theirs + "self_attn.v_proj.weight"] = qkv[:, -1].reshape(-1, shape.hidden_size)
        state[theirs + "self_attn.o_proj.weight"] = weights[ours + "self_attention.linear_proj.weight"]
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        state |= {theirs + "mlp.gate_proj.weight": gate, theirs + "mlp.up_proj.weight": up}
        state[theirs + "mlp.down_proj.weight"] = weights[ours + "mlp.linear_fc2.weight"]
        state[theirs + "input_layernorm.weight"] = weights[ours + "input_layernorm.weight"]
        state[theirs + "post_attention_layernorm.weight"] = weights[ours + "pre_mlp_layernorm.weight"]
    llama.load_state_dict(state, strict=True)
    return llama


@pytest.mark.parametrize("num_query_groups", [8, 4, 1])
def test_rewards_equal_llama_for_sequence_classification(num_query_groups):
    here, there = run_ranks(rewards_here_and_there, 1, num_query_groups)[0]
    assert np.abs(there).max() > 0.01, "rewards near zero would prove nothing"
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)
