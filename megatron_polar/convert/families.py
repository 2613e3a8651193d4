"""What each family of Hugging Face models calls its weights and settings, and how those are named here. No torch.

POLAR's published checkpoints are InternLM2 models; Llama, Qwen2 and Qwen3 are served as sequence classifiers with one
label. The decoder is the same in all of them: RMSNorm, RoPE, grouped-query
attention, SwiGLU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from megatron_polar.config.presets import Architecture
from megatron_polar.config.schema import ModelSection
from megatron_polar.errors import UserError

Layout = Literal["internlm2", "sequence-classification"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
"""Forms of an export."""
EMBEDDING, FINAL_NORM, HEAD = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)
_ATTENTION, _MLP = "decoder.layers.self_attention.", "decoder.layers.mlp."


@dataclass(frozen=True)
class Family:
    """One family: its classes, and for each of our tensors the tensors of theirs that it is made of.

    `tensors` maps megatron-core's names, those of layers without their number, to theirs with `{}` for the number.
    `ignored` are endings of tensors that a reward model has no use for.
    """

    name: str
    model_type: str
    language_model: str
    reward_models: tuple[str, ...]
    head: str
    tensors: dict[str, tuple[str, ...]]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One of our tensors, of one layer or of none, and the names of the tensors that it is made of."""

    key: str
    layer: int | None
    names: tuple[str, ...]


def _llama_style(*, has_qkv_bias: bool, has_qk_norm: bool) -> dict[str, tuple[str, ...]]:
    layer, attention, mlp = "model.layers.{}.", "model.layers.{}.self_attn.", "model.layers.{}.mlp."
    tensors = {
        EMBEDDING: ("model.embed_tokens.weight",),
        f"{_ATTENTION}linear_qkv.layer_norm_weight": (f"{layer}input_layernorm.weight",),
        f"{_ATTENTION}linear_qkv.weight": tuple(f"{attention}{part}_proj.weight" for part in "qkv"),
        f"{_ATTENTION}linear_proj.weight": (f"{attention}o_proj.weight",),
        f"{_MLP}linear_fc1.layer_norm_weight": (f"{layer}post_attention_layernorm.weight",),
        f"{_MLP}linear_fc1.weight": (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
        f"{_MLP}linear_fc2.weight": (f"{mlp}down_proj.weight",),
        FINAL_NORM: ("model.norm.weight",),
    }
    if has_qkv_bias:
        tensors[f"{_ATTENTION}linear_qkv.bias"] = tuple(f"{attention}{part}_proj.bias" for part in "qkv")
    if has_qk_norm:
        tensors[f"{_ATTENTION}q_layernorm.weight"] = (f"{attention}q_norm.weight",)
        tensors[f"{_ATTENTION}k_layernorm.weight"] = (f"{attention}k_norm.weight",)
    return tensors


_INTERNLM2_TENSORS = {
    EMBEDDING: ("model.tok_embeddings.weight",),
    f"{_ATTENTION}linear_qkv.layer_norm_weight": ("model.layers.{}.attention_norm.weight",),
    # One tensor with q..q, k, v of each key/value group in turn: Megatron's own order.
    f"{_ATTENTION}linear_qkv.weight": ("model.layers.{}.attention.wqkv.weight",),
    f"{_ATTENTION}linear_proj.weight": ("model.layers.{}.attention.wo.weight",),
    f"{_MLP}linear_fc1.layer_norm_weight": ("model.layers.{}.ffn_norm.weight",),
    f"{_MLP}linear_fc1.weight": ("model.layers.{}.feed_forward.w1.weight", "model.layers.{}.feed_forward.w3.weight"),
    f"{_MLP}linear_fc2.weight": ("model.layers.{}.feed_forward.w2.weight",),
    FINAL_NORM: ("model.norm.weight",),
}


def _classifiers(name: str) -> tuple[str, ...]:
    return (f"{name}ForSequenceClassification", f"{name}ForRewardModel")


_COMMON = {"head": "score.weight", "ignored": ("lm_head.weight", "rotary_emb.inv_freq")}
INTERNLM2 = Family(
    name="InternLM2",
    model_type="internlm2",
    language_model="InternLM2ForCausalLM",
    reward_models=("InternLM2ForRewardModel",),
    head="v_head.weight",
    tensors=_INTERNLM2_TENSORS,
    ignored=("output.weight", "rotary_emb.inv_freq"),
)
LLAMA = Family(
    name="Llama",
    model_type="llama",
    language_model="LlamaForCausalLM",
    reward_models=_classifiers("Llama"),
    tensors=_llama_style(has_qkv_bias=False, has_qk_norm=False),
    **_COMMON,
)
QWEN2 = Family(
    name="Qwen2",
    model_type="qwen2",
    language_model="Qwen2ForCausalLM",
    reward_models=_classifiers("Qwen2"),
    tensors=_llama_style(has_qkv_bias=True, has_qk_norm=False),
    **_COMMON,
)
QWEN3 = Family(
    name="Qwen3",
    model_type="qwen3",
    language_model="Qwen3ForCausalLM",
    reward_models=_classifiers("Qwen3"),
    tensors=_llama_style(has_qkv_bias=False, has_qk_norm=True),
    **_COMMON,
)
FAMILIES = (INTERNLM2, LLAMA, QWEN2, QWEN3)


def entries(family: Family, architecture: Architecture, *, with_head: bool) -> Iterator[Entry]:
    """All tensors of a model, layer by layer, in the order in which a forward pass needs them."""
    per_layer = {key: names for key, names in family.tensors.items() if "{}" in names[0]}
    yield Entry(EMBEDDING, None, family.tensors[EMBEDDING])
    for layer in range(architecture.num_layers):
        for key, names in per_layer.items():
            yield Entry(key, layer, tuple(name.format(layer) for name in names))
    yield Entry(FINAL_NORM, None, family.tensors[FINAL_NORM])
    if with_head:
        yield Entry(HEAD, None, (family.head,))


def shape_of(key: str, architecture: Architecture, *, vocab_size: int) -> tuple[int, ...]:
    """Shape of one of our tensors in one layer, whole; `vocab_size` counts the embedding's rows."""
    hidden, head_size = architecture.hidden_size, architecture.kv_channels
    qkv = (architecture.num_attention_heads + 2 * architecture.num_query_groups) * head_size
    return {
        EMBEDDING: (vocab_size, hidden),
        FINAL_NORM: (hidden,),
        HEAD: (1, hidden),
        f"{_ATTENTION}linear_qkv.layer_norm_weight": (hidden,),
        f"{_ATTENTION}linear_qkv.weight": (qkv, hidden),
        f"{_ATTENTION}linear_qkv.bias": (qkv,),
        f"{_ATTENTION}q_layernorm.weight": (head_size,),
        f"{_ATTENTION}k_layernorm.weight": (head_size,),
        f"{_ATTENTION}linear_proj.weight": (hidden, architecture.num_attention_heads * head_size),
        f"{_MLP}linear_fc1.layer_norm_weight": (hidden,),
        f"{_MLP}linear_fc1.weight": (2 * architecture.ffn_hidden_size, hidden),
        f"{_MLP}linear_fc2.weight": (hidden, architecture.ffn_hidden_size),
    }[key]


# --- Their configuration to ours -------------------------------------------------------------------------------------


def family_of(config: dict[str, Any], *, where: str) -> tuple[Family, bool]:
    """The family of a config.json, and whether the model has a reward head. Raises UserError for any other model."""
    named = config.get("architectures")
    named = named[0] if isinstance(named, list) and named else None
    for family in FAMILIES:
        if named == family.language_model or named in family.reward_models:
            if config.get("model_type") != family.model_type:
                raise UserError(
                    f"{where}: architectures names {named}, and model_type is {config.get('model_type')!r} instead of "
                    f"{family.model_type!r}; fetch the file again"
                )
            return family, named != family.language_model
    known = ", ".join(name for family in FAMILIES for name in (family.language_model, *family.reward_models))
    raise UserError(f"{where}: architectures is {named!r}, which cannot be converted; known here: {known}")


def model_section(config: dict[str, Any], family: Family, *, where: str) -> ModelSection:
    """The `model` section of a config.json. Raises UserError for what this model cannot express."""
    _refuse_what_changes_results(config, family, where=where)
    heads = _positive(config, "num_attention_heads", where=where)
    hidden = _positive(config, "hidden_size", where=where)
    theta, scaling = _rope(config, where=where)
    head_size = config.get("head_dim")
    return ModelSection(
        num_layers=_positive(config, "num_hidden_layers", where=where),
        hidden_size=hidden,
        ffn_hidden_size=_positive(config, "intermediate_size", where=where),
        num_attention_heads=heads,
        num_query_groups=_positive(config, "num_key_value_heads", where=where, default=heads),
        kv_channels=_positive(config, "head_dim", where=where) if head_size else hidden // heads,
        rotary_base=theta,
        rope_scaling_factor=scaling,
        layernorm_epsilon=_number(config, "rms_norm_eps", where=where, default=1e-6),
        add_qkv_bias=family is QWEN2,
        qk_layernorm=family is QWEN3,
        vocab_size=_positive(config, "vocab_size", where=where),
        max_position_embeddings=_positive(config, "max_position_embeddings", where=where),
    )


def _refuse_what_changes_results(config: dict[str, Any], family: Family, *, where: str) -> None:
    expected = {"hidden_act": ("silu",), "mlp_bias": (False,), "bias": (False,), "use_sliding_window": (False,)}
    if config.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config is set: quantised weights cannot be converted; use the originals"
        )
    if family is not QWEN2:  # whose bias on q, k, v is not in its configuration
        expected["attention_bias"] = (False,)
    for key, allowed in expected.items():
        if config.get(key, allowed[0]) not in (*allowed, None):
            raise UserError(
                f"{where}: {key} is {config[key]!r}, and only {allowed[0]!r} can be converted; use another model"
            )


def _rope(config: dict[str, Any], *, where: str) -> tuple[float, float | None]:
    """RoPE's base, and Llama 3.1's scaling factor or None. transformers 4 and 5 write these differently."""
    given = {name: config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)}
    for name, scaling in given.items():
        if not isinstance(scaling, dict):
            raise UserError(f"{where}: {name} is {scaling!r:.80}; fetch the file again")
    settings = {(name, repr(value)) for scaling in given.values() for name, value in scaling.items()}
    kinds = {_kind_of_rope(scaling) for scaling in given.values()}
    if len(kinds) > 1 or len({name for name, _ in settings}) < len(settings):
        raise UserError(f"{where}: rope_parameters and rope_scaling disagree ({given}); take out the one that is wrong")
    scaling = {name: value for entry in given.values() for name, value in entry.items()}
    theta = _number({**config, **scaling}, "rope_theta", where=where, default=10000)
    kind = _kind_of_rope(scaling)
    if kind in ("default", "dynamic"):  # dynamic: nothing changes within max_position_embeddings
        return theta, None
    llama3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    if kind == "llama3" and all(scaling.get(key) == value for key, value in llama3.items()):
        return theta, _number(scaling, "factor", where=where)
    raise UserError(
        f"{where}: RoPE scaling {scaling} cannot be expressed here; known are default, dynamic (within "
        f"max_position_embeddings) and Llama 3.1's {llama3}"
    )


def _kind_of_rope(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _positive(config: dict[str, Any], key: str, *, where: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {key} is {value!r:.80}, not a number above 0; fetch the file again")
    return value


def _number(config: dict[str, Any], key: str, *, where: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float) or not value > 0:
        raise UserError(f"{where}: {key} is {value!r:.80}, not a number above 0; fetch the file again")
    return float(value)


# --- Our configuration to theirs -------------------------------------------------------------------------------------


def export_family(architecture: Architecture, *, layout: Layout) -> Family:
    """The family that expresses an architecture in a layout. Raises UserError when none does."""
    has_bias, has_norm = architecture.add_qkv_bias, architecture.qk_layernorm
    if has_bias and has_norm:
        raise UserError("model.add_qkv_bias and model.qk_layernorm together: no family of Hugging Face has both")
    if layout == "internlm2":
        for name in ("add_qkv_bias", "qk_layernorm", "rope_scaling_factor"):
            if getattr(architecture, name):
                raise UserError(f"model.{name} is set, and InternLM2 has no such thing; use sequence-classification")
        if architecture.kv_channels * architecture.num_attention_heads != architecture.hidden_size:
            raise UserError(
                "model.kv_channels is not hidden_size / heads, as in InternLM2; use sequence-classification"
            )
        return INTERNLM2
    family = QWEN3 if has_norm else QWEN2 if has_bias else LLAMA
    if architecture.rope_scaling_factor and family is not LLAMA:
        raise UserError(f"model.rope_scaling_factor is set, and {family.name} has no such thing")
    return family


def export_config(
    family: Family, architecture: Architecture, *, vocab_size: int, max_positions: int, dtype: str, ids: dict[str, int]
) -> dict[str, Any]:
    """The config.json of an export; `ids` are those of bos, pad and reward tokens, as far as there are any.

    Keys are those that transformers 4 and 5, vLLM, SGLang and LMDeploy all read.
    """
    scaling = None
    if architecture.rope_scaling_factor:
        scaling = {"rope_type": "llama3", "factor": architecture.rope_scaling_factor, "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = {
        "architectures": [family.reward_models[0]],
        "model_type": family.model_type,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "rms_norm_eps": architecture.layernorm_epsilon,
        "rope_theta": architecture.rotary_base,
        "rope_scaling": scaling,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": dtype,
        **{f"{name}_token_id": id for name, id in ids.items() if name != "reward"},
    }
    if family is INTERNLM2:
        config["auto_map"] = {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
        }
        return config | {"bias": False, "reward_token_id": ids["reward"]}
    head = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "problem_type": "regression"}
    bias = {} if family is QWEN2 else {"attention_bias": False}
    return config | head | bias | {"head_dim": architecture.kv_channels}
