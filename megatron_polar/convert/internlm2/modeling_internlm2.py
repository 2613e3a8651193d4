"""InternLM2ForRewardModel for transformers, in the key layout of POLAR's published checkpoints.

One forward pass over whole texts, without a cache: a reward model reads and does not write. Padding may be on either
side. b texts, s tokens, h hidden.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration_internlm2 import InternLM2Config


class InternLM2RMSNorm(nn.Module):
    """Root-mean-square norm, in fp32 whatever the weights' type."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states):
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden_states.dtype)


class InternLM2Attention(nn.Module):
    """Grouped-query attention; `wqkv` holds q..q, k, v of each key/value group in turn."""

    def __init__(self, config):
        super().__init__()
        self.num_groups = config.num_key_value_heads
        self.queries_per_group = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, rows, bias=config.bias)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, hidden_states, cos, sin, mask):
        b, s, _ = hidden_states.shape
        grouped = self.wqkv(hidden_states).view(b, s, self.num_groups, self.queries_per_group + 2, self.head_dim)
        query = grouped[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = (grouped[..., i, :].transpose(1, 2) for i in (-2, -1))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key, value = (x.repeat_interleave(self.queries_per_group, dim=1) for x in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.wo(attended.transpose(1, 2).reshape(b, s, -1))


class InternLM2MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.w2(F.silu(self.w1(hidden_states)) * self.w3(hidden_states))


class InternLM2DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = InternLM2Attention(config)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, cos, sin, mask):
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), cos, sin, mask)
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states))


class InternLM2PreTrainedModel(PreTrainedModel):
    config_class = InternLM2Config
    base_model_prefix = "model"
    _no_split_modules = ["InternLM2DecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)


class InternLM2Model(InternLM2PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([InternLM2DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.tok_embeddings

    def set_input_embeddings(self, value):
        self.tok_embeddings = value

    def forward(self, input_ids, attention_mask=None):
        """input_ids and attention_mask [b, s] → hidden states after the last norm [b, s, h]."""
        s = input_ids.shape[1]
        present = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        causal = torch.ones(s, s, dtype=torch.bool, device=input_ids.device).tril()
        # A row of padding sees itself, so that no row is empty; nothing else sees padding.
        sees = causal & (present[:, None, :] | torch.eye(s, dtype=torch.bool, device=input_ids.device))
        positions = (present.long().cumsum(1) - 1).clamp(min=0)
        cos, sin = rotary(positions, self.config)
        hidden_states = self.tok_embeddings(input_ids)
        cos, sin = (x[:, None].to(hidden_states.dtype) for x in (cos, sin))
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin, sees[:, None])
        return self.norm(hidden_states)


class InternLM2ForRewardModel(InternLM2PreTrainedModel):
    """A scalar for each text, read at its last token that is no padding: the reward token."""

    def __init__(self, config):
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def set_input_embeddings(self, value):
        self.model.tok_embeddings = value

    def forward(self, input_ids, attention_mask=None, **unused):
        """input_ids and attention_mask [b, s] → logits [b, 1]."""
        hidden_states = self.model(input_ids, attention_mask=attention_mask)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        last = mask.long().cumsum(1).argmax(1)
        rows = hidden_states[torch.arange(len(last), device=last.device), last]
        return SequenceClassifierOutput(logits=self.v_head(rows))


def rotary(positions, config):
    """positions [b, s] → cosine and sine [b, s, head_dim] of RoPE, in fp32."""
    head_dim = config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None] / config.rope_theta**exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x [b, heads, s, head_dim], turned by its positions (halves, not pairs)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
