"""The YAML says exactly what runs, and whatever does not fit is refused with the key, the value and the remedy."""

import dataclasses
import math
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from megatron_polar.config.load import dump_config, load_config
from megatron_polar.config.presets import PRESETS, architecture_of, padded_vocab_size
from megatron_polar.config.schema import ModelSection, RunConfig
from megatron_polar.errors import UserError

GOOD = """
run: {directory: runs/x}
model: {preset: nano}
data: {train: [{path: a}]}
train: {global_batch_size: 8, num_steps: 3}
optimizer: {lr: 1e-3}
"""


@pytest.fixture
def load(tmp_path):
    """Load GOOD (or another text) with overrides."""

    def load_text(*overrides: str, text: str | bytes = GOOD):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(path, overrides)

    return load_text


def refusal(load, *overrides: str, text: str | bytes = GOOD) -> str:
    with pytest.raises(UserError) as caught:
        load(*overrides, text=text)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_dumped_loads_to_the_same_configuration(load, tmp_path):
    config = load(
        "model.kv_channels=16",
        "data.train=[{path: a, weight: 1.5}, {path: b, weight: 2}]",
        "data.validation=[{path: c}]",
        "optimizer.adam_eps=1e-12",
        "train.num_steps=null",
        "train.num_epochs=2",
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
    )
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config
    assert config.train.num_epochs == 2.0
    assert config.data.train[1].weight == 2.0
    assert config.optimizer.adam_eps == 1e-12


def test_an_override_wins_over_the_file_and_leaves_the_rest(load):
    config, plain = load("train.global_batch_size=16"), load()
    assert config.train.global_batch_size == 16
    assert dataclasses.replace(config, train=plain.train) == plain


def test_yaml_1_1_exponents_are_numbers(load):
    assert load().optimizer.lr == 1e-3  # YAML 1.1 reads 1e-3 as a string


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("modle.preset=nano", "model"),
        ("train.global_batchsize=4", "train.global_batch_size"),
        ("parallel.tensor_parallel_size=2", "parallel.tensor_model_parallel_size"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(load, override, nearest):
    message = refusal(load, override)
    assert f"unknown key {override.partition('=')[0].split('.')[0]}" in message
    assert f"did you mean {nearest}?" in message


def test_an_unknown_key_inside_a_list_is_named_with_its_place(load):
    assert "unknown key data.train[0].wieght; did you mean data.train[0].weight?" in refusal(
        load, "data.train=[{path: a, wieght: 2}]"
    )


def test_a_key_like_no_other_lists_the_known_ones(load):
    assert "known here: global_batch_size, num_steps" in refusal(load, "train.zzz=1")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.global_batch_size=8.5", ("train.global_batch_size=8.5", "int", "float")),
        ("train.global_batch_size=true", ("train.global_batch_size=True", "int", "bool")),
        ("train.global_batch_size='8'", ("train.global_batch_size='8'", "int", "str")),
        ("optimizer.lr=fast", ("optimizer.lr='fast'", "float")),
        ("run.directory=3", ("run.directory=3", "str")),
        ("run.deterministic=1", ("run.deterministic=1", "bool")),
        ("data.train=a", ("data.train='a'", "list")),
        ("data.train=[a]", ("data.train[0]", "mapping")),
        ("train=5", ("train", "mapping", "5")),
        ("train.precision=bf61", ("train.precision='bf61'", "bf16, fp32", "did you mean bf16?")),
        ("data.layout=shared", ("data.layout='shared'", "shared_prefix, packed, padded")),
        ("model.preset=polar_7", ("model.preset='polar_7'", "did you mean 'polar_7b'?")),
        ("nonsense", ("'nonsense'", "section.key=value")),
        ("data.train.0.path=b", ("list", "data.train=[{path: DIRECTORY}]")),
    ],
)
def test_a_wrong_type_names_key_value_and_what_is_expected(load, override, parts):
    message = refusal(load, override)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("text", ["- a\n- b\n", "hello", "", "a: [1", b"\xff\xfe\x00", "run: {directory: r}\nrun: {}"])
def test_a_file_that_is_no_mapping_of_sections_is_refused_by_name(load, text):
    assert "run.yaml" in refusal(load, text=text)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=str(tmp_path / name).rstrip("/.")):
        load_config(tmp_path / name)


def test_a_missing_section_or_key_is_named(load):
    assert "optimizer is missing" in refusal(load, text=GOOD.replace("optimizer: {lr: 1e-3}", ""))
    assert "optimizer.lr is missing" in refusal(load, text=GOOD.replace("lr: 1e-3", ""))
    assert "model.num_layers is missing" in refusal(load, "model.preset=null", "model.hidden_size=64")


# --- every rule of validate.py: override(s), then what the message must hold -----------------------------------------

AT_LEAST_ONE = [
    "train.global_batch_size",
    "train.recompute_num_layers",
    "data.max_tokens_per_micro_batch",
    "data.pad_to_multiple",
    "data.prefetch_factor",
    "checkpoint.save_interval",
    "evaluation.num_comparisons",
    "logging.interval",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.distributed_timeout_minutes",
    "model.make_vocab_size_divisible_by",
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.kv_channels",
]
NOT_NEGATIVE = [
    "run.seed",
    "data.num_workers",
    "checkpoint.keep",
    "evaluation.interval",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "optimizer.adam_eps",
    "model.reward_head_init_std",
]
ABOVE_0 = ["model.rotary_base", "model.rope_scaling_factor", "model.layernorm_epsilon", "model.init_method_std"]
FRACTIONS = [
    "model.hidden_dropout",
    "model.attention_dropout",
    "optimizer.warmup_fraction",
    "optimizer.min_lr_fraction",
]
RULES = [
    *[(f"{key}=0", f"{key}=0", "at least 1") for key in AT_LEAST_ONE],
    *[(f"{key}=-1", f"{key}=-1", "must not be negative") for key in NOT_NEGATIVE],
    *[(f"{key}=1.5", f"{key}=1.5", "between 0 and 1") for key in FRACTIONS],
    *[(f"{key}={value}", f"{key}={value}.0 must be above 0", "leave it out") for key in ABOVE_0 for value in (0, -1)],
    ("model.kv_channels=33", "model.kv_channels=33 must be even", "hidden_size / num_attention_heads"),
    ("model.num_attention_heads=128 model.num_query_groups=2", "model.kv_channels=1", "set an even number"),
    ("optimizer.adam_beta1=1", "optimizer.adam_beta1=1.0", "below 1"),
    ("optimizer.adam_beta2=-0.5", "optimizer.adam_beta2=-0.5", "at least 0"),
    ("optimizer.lr=0", "optimizer.lr=0.0", "above 0"),
    ("data.candidates_per_comparison=1", "data.candidates_per_comparison=1", "at least 2"),
    ("data.max_sequence_length=8", "data.max_sequence_length=8", "use 16 or more"),
    (
        "model.max_position_embeddings=4096 data.max_sequence_length=4097",
        "data.max_sequence_length=4097 is more than model.max_position_embeddings=4096",
        "raise the second",
    ),
    ("train.num_steps=null", "train.num_steps=None", "exactly one of the two"),
    ("train.num_epochs=1", "train.num_epochs=1.0", "exactly one of the two"),
    ("train.num_steps=0", "train.num_steps=0", "above 0"),
    ("optimizer.overlap_param_gather=true", "optimizer.overlap_param_gather=true", "overlap_grad_reduce=true"),
    (
        "optimizer.overlap_param_gather=true optimizer.overlap_grad_reduce=true "
        "optimizer.use_distributed_optimizer=false train.precision=fp32",
        "optimizer.overlap_param_gather=true",
        "use_distributed_optimizer=true",
    ),
    ("model.attention_dropout=0.1", "model.attention_dropout=0.1", "data.layout=padded"),
    (
        "model.attention_dropout=0.1 data.layout=padded model.attention=dense",
        "model.attention_dropout=0.1 is not possible with model.attention=dense",
        "use model.attention=auto",
    ),
    ("optimizer.use_distributed_optimizer=false", "train.precision=bf16", "set it to true"),
    ("data.train=[]", "data.train is empty", "megatron-polar preprocess"),
    ("data.train=[{path: a, weight: 1}, {path: b}]", "data.train", "give all a weight, or none"),
    ("data.validation=[{path: a, weight: 0}]", "data.validation: weights [0.0]", "above 0"),
    ("parallel.tensor_model_parallel_size=3", "parallel.tensor_model_parallel_size=3", "use 1, 2"),
    ("model.num_query_groups=3", "model.num_query_groups=3", "model.num_attention_heads=4"),
    ("parallel.context_parallel_size=4", "parallel.context_parallel_size=4", "use 1, 2"),
    (
        "parallel.virtual_pipeline_model_parallel_size=2",
        "virtual_pipeline_model_parallel_size=2",
        "set it to null for plain 1F1B",
    ),
    ("parallel.pipeline_model_parallel_size=3", "pipeline_model_parallel_size=3", "model.num_layers=2"),
    ("parallel.sequence_parallel=true", "parallel.sequence_parallel=true", "set it to false"),
    (
        "train.recompute=full train.recompute_num_layers=3",
        "train.recompute_num_layers=3 does not divide the 2 layers",
        "use 1, 2",
    ),
    ("train.fp8=tensorwise train.precision=fp32", "train.fp8=tensorwise", "train.precision=bf16"),
    ("train.fp8=tensorwise train.fp8_bf16_layers=2", "train.fp8_bf16_layers=2", "between 0 and 1"),
    ("train.fp8=delayed", "train.fp8_bf16_layers=1", "fp8_bf16_layers=0 and data.pad_to_multiple=128"),
    ("train.fp8=blockwise", "data.pad_to_multiple=16", "set it to 128"),
    (
        "train.fp8=tensorwise train.fp8_bf16_layers=0",
        "data.pad_to_multiple=16: the reward rows of a last layer in FP8",
        "set it to 128",
    ),
    ("train.fp8_param_gather=true", "with train.fp8=off", "train.fp8=tensorwise or blockwise"),
    (
        "train.fp8_param_gather=true train.fp8=delayed train.fp8_bf16_layers=0",
        "no checkpoint has the history",
        "train.fp8=tensorwise or blockwise",
    ),
    (
        "train.fp8_param_gather=true train.fp8=tensorwise train.fp8_bf16_layers=0",
        "train.fp8_bf16_layers of at least 1",
        "model.last_layer=all_rows",
    ),
    (
        "train.fp8=tensorwise model.ffn_hidden_size=350",
        "model.ffn_hidden_size=350 is no multiple of 16",
        "another width",
    ),
    (
        "train.fp8=tensorwise model.ffn_hidden_size=344 parallel.tensor_model_parallel_size=2",
        "model.ffn_hidden_size=344 over parallel.tensor_model_parallel_size=2 is 172, which is no multiple of 16",
        "tensor-parallel size, or train.fp8=off",
    ),
    (
        "train.fp8=blockwise data.pad_to_multiple=128 model.hidden_size=192 parallel.sequence_parallel=true "
        "parallel.tensor_model_parallel_size=2",
        "model.hidden_size=192 is no multiple of 128, as train.fp8=blockwise needs",
        "use another width",
    ),
    (
        "train.fp8=delayed train.fp8_bf16_layers=0 data.pad_to_multiple=128 model.kv_channels=6",
        "model.num_attention_heads x model.kv_channels=24 is no multiple of 16",
        "train.fp8=off",
    ),
    ("train.gradient_accumulation_fusion=maybe", "'maybe'", "must be one of auto, true, false"),
    ("model.num_attention_heads=3", "model.hidden_size=128", "model.num_attention_heads=3"),
]


@pytest.mark.parametrize(
    ("written", "means"), [("true", True), ("false", False), ("on", True), ("off", False), ("auto", "auto")]
)
def test_gradient_fusion_is_written_as_it_always_was_or_auto(load, written, means):
    found = load(f"train.gradient_accumulation_fusion={written}").train.gradient_accumulation_fusion
    assert (type(found), found) == (type(means), means)


def test_off_may_be_written_without_quotes(load):
    """YAML 1.1 reads it as false."""
    assert load("train.fp8=off").train.fp8 == "off"


@pytest.mark.parametrize(("overrides", "what", "remedy"), RULES, ids=[rule[0] for rule in RULES])
def test_every_rule_names_key_value_and_remedy(load, overrides, what, remedy):
    pieces = [overrides] if "[" in overrides else overrides.split()
    message = refusal(load, *pieces)
    assert what in message
    assert remedy in message


def float_keys(section: type, prefix: str = "") -> list[str]:
    """Every key of the schema that takes a float, but for those of datasets, which stand in lists."""
    keys = []
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            keys += float_keys(hint, f"{prefix}{name}.")
        elif float in (hint, *typing.get_args(hint)):
            keys.append(f"{prefix}{name}")
    return keys


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_number_of_the_configuration_may_be_infinite_or_nan(load, number):
    keys = float_keys(RunConfig)
    assert {"train.num_epochs", "data.curriculum.floor", "optimizer.lr", "model.rotary_base"} <= {*keys}
    for key in keys:
        message = refusal(load, f"{key}={number}")
        assert f"{key}={number} is no finite number" in message
        assert "leave the key out" in message
    for name in ("train", "validation"):
        message = refusal(load, f"data.{name}=[{{path: a, weight: 1}}, {{path: b, weight: {number}}}]")
        assert f"data.{name}[1].weight={number} is no finite number" in message


def test_an_architecture_takes_no_infinite_number_wherever_it_comes_from():
    for number in (math.nan, math.inf):
        with pytest.raises(UserError, match=rf"model.rotary_base={number} must be above 0, and finite"):
            architecture_of(ModelSection(preset="nano", rotary_base=number))


def test_limits_themselves_are_allowed(load):
    load(
        "optimizer.adam_beta1=0",
        "optimizer.clip_grad=0",
        "checkpoint.keep=0",
        "evaluation.interval=0",
        "data.num_workers=0",
        "optimizer.min_lr_fraction=1",
        "optimizer.warmup_fraction=1",
        "data.max_sequence_length=16",
        "model.attention_dropout=0.1",
        "data.layout=padded",
    )


# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "billions"), [("polar_1_8b", "1.700"), ("polar_7b", "7.359")])
def test_presets_have_the_released_models_parameter_counts(preset, billions):
    assert f"{PRESETS[preset].num_parameters(92544) / 1e9:.3f}" == billions


def test_fields_override_the_preset_and_the_head_dimension_follows():
    assert architecture_of(ModelSection(preset="nano", num_layers=5)).num_layers == 5
    assert architecture_of(ModelSection(preset="nano", hidden_size=256)).kv_channels == 64
    assert architecture_of(ModelSection(preset="nano", hidden_size=256, kv_channels=32)).kv_channels == 32
    own = ModelSection(num_layers=1, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4)
    assert architecture_of(own).num_query_groups == 4


@pytest.mark.parametrize(
    ("vocab", "multiple", "rows"), [(1, 128, 128), (128, 128, 128), (129, 128, 256), (420, 1, 420)]
)
def test_the_vocabulary_is_padded_up_to_the_multiple(vocab, multiple, rows):
    assert padded_vocab_size(vocab, multiple=multiple) == rows


def test_forward_flops_are_two_per_weight_and_token_plus_attention():
    shape, nothing = PRESETS["nano"], {"tokens": 0, "attended": 0, "rewards": 0, "reward_keys": 0}
    keys_values = 2 * 128 * 2 * 32
    assert shape.forward_flops(**nothing | {"tokens": 1}) == 2 * (shape.layer_parameters + keys_values)
    assert shape.forward_flops(**nothing | {"rewards": 1}) == 2 * (shape.layer_parameters - keys_values)
    # QK^T and AV: two products of 2 FLOPs per pair, head and channel
    assert shape.forward_flops(**nothing | {"attended": 7}) == 7 * 2 * 2 * 4 * 32
    assert shape.forward_flops(**nothing | {"reward_keys": 7}) == 7 * 2 * 2 * 4 * 32


def test_reading_a_configuration_takes_no_torch():
    program = (
        "import sys, megatron_polar.config.load, megatron_polar.cli; print([m for m in sys.modules if m == 'torch'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert done.stdout.strip() == "[]"
