"""Where a run may not start from: a model that its weights were not trained as, ranks that are not alike."""

import os
import shutil
import socket

import pytest
from ranks import run_ranks
from tiny_runs import change, metric_rows, run_training, tiny_config, training_refusal

from megatron_polar.errors import UserError
from megatron_polar.model import build as model_build
from megatron_polar.train.run import train


@pytest.mark.parametrize(
    ("key", "value"), [("rotary_base", 500.0), ("layernorm_epsilon", 1e-2), ("rope_scaling_factor", 8.0)]
)
def test_another_function_of_the_same_weights_is_refused(key, value, trajectory_corpus, tmp_path):
    config = tiny_config(trajectory_corpus, tmp_path / "run", train__num_steps=1)
    run_ranks(run_training, 1, config)
    other = {f"model__{key}": value}
    again = change(config, train__num_steps=2, **other)
    message = training_refusal(again)
    assert message.startswith(f"{tmp_path}/run/checkpoints/step_00000001: was made with model.{key}=")
    started = change(again, run__directory=str(tmp_path / "new"), train__init_from=str(tmp_path / "run"))
    message = training_refusal(started)
    assert message.startswith(f"train.init_from={tmp_path}/run/checkpoints/step_00000001: was made with model.{key}=")
    assert [row["iteration"] for row in metric_rows(tmp_path / "run")] == [1]


@pytest.mark.parametrize("key", ["add_qkv_bias", "qk_layernorm"])
def test_weights_that_the_model_lacks_are_not_dropped(key, trajectory_corpus, tmp_path):
    own = {f"model__{key}": True}
    run_ranks(run_training, 1, tiny_config(trajectory_corpus, tmp_path / "run", train__num_steps=1, **own))
    config = tiny_config(trajectory_corpus, tmp_path / "new", train__init_from=str(tmp_path / "run"))
    assert f"was made with model.{key}=True, and this run has False" in training_refusal(config)


def test_heads_of_another_number_are_another_function(trajectory_corpus, tmp_path):
    """4 heads in 2 groups of 8 numbers and 2 heads in 1 group of 16 have the same shapes."""
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8}
    shape = {f"model__{name}": value for name, value in shape.items()}
    run_ranks(run_training, 1, tiny_config(trajectory_corpus, tmp_path / "run", train__num_steps=1, **shape))
    other = {"num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 16}
    shape |= {f"model__{name}": value for name, value in other.items()}
    config = tiny_config(trajectory_corpus, tmp_path / "new", train__init_from=str(tmp_path / "run"), **shape)
    assert "was made with model.num_attention_heads=4, and this run has 2" in training_refusal(config)


def test_a_run_whose_checkpoints_have_vanished_does_not_start_over(trajectory_corpus, tmp_path):
    config = tiny_config(trajectory_corpus, tmp_path / "run", train__num_steps=3)
    run_ranks(run_training, 1, config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    message = training_refusal(change(config, train__num_steps=6))
    assert f"{tmp_path}/run: events.jsonl tells of a checkpoint of step 3, and there is none" in message
    assert [row["iteration"] for row in metric_rows(tmp_path / "run")] == [1, 2, 3]


def with_a_rank_that_cannot_build(config, problem):
    def resolve(requested: str, *, device_kind: str) -> str:
        if os.environ["RANK"] == "1":
            raise problem
        return "local"

    model_build.resolve_transformer_impl = resolve
    try:
        train(config)
    except UserError as error:
        return str(error)


def test_what_one_rank_cannot_build_all_refuse_and_name(trajectory_corpus, tmp_path):
    problem = UserError("model.transformer_impl=transformer_engine, but Transformer Engine is not usable here")
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    said = run_ranks(with_a_rank_that_cannot_build, 2, config, problem)
    assert said == [f"rank 1 on {socket.gethostname()}: {problem} (1 of 2 ranks find nothing wrong)"] * 2
