"""The plan before a run: the paper's laws, memory that equals what the real model holds, and every obstacle at once."""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_runs import change, run_training, tiny_config

from megatron_polar.cli import main
from megatron_polar.config.load import dump_config, load_config
from megatron_polar.config.presets import PRESETS
from megatron_polar.config.schema import DatasetSource, ParallelSection
from megatron_polar.errors import USER_ERROR, UserError
from megatron_polar.scaling.fp8 import num_fp8_layers
from megatron_polar.scaling.laws import SIZES, batch_size, peak_learning_rate
from megatron_polar.scaling.memory import (
    Layout,
    estimate_memory,
    layer_activations,
    layout_of,
    longest_comparison,
    passes_in_flight,
    stage_parameters,
)
from megatron_polar.scaling.plan import Cluster, make_plan
from megatron_polar.scaling.table import render_plan, short

ROOT = Path(__file__).resolve().parents[1]
ONE = Layout(tp=1, pp=1, vpp=None, cp=1, dp=1, sequence_parallel=False)

# --- The paper's laws ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "batch", "learning_rate"), [("polar_1_8b", 1939.7, 1.429e-5), ("polar_7b", 4342.8, 1.674e-5)]
)
def test_the_laws_give_the_papers_own_settings(preset, batch, learning_rate):
    assert batch_size(SIZES[preset]) == pytest.approx(batch, abs=0.06)
    assert peak_learning_rate(SIZES[preset]) == pytest.approx(learning_rate, rel=5e-4)


@pytest.mark.parametrize("name", ["parameters", "base_tokens", "reward_tokens"])
def test_the_laws_refuse_sizes_that_are_none(name):
    with pytest.raises(UserError, match=name.replace("_", " ")):
        dataclasses.replace(SIZES["polar_7b"], **{name: -1.0})


# --- Memory against the real model -----------------------------------------------------------------------------------

MOMENTS = ("exp_avg", "exp_avg_sq")
LAYOUTS = {  # parallel sizes, ranks, precision
    "tp1": ({}, 1, "fp32"),
    "tp2": ({"tensor_model_parallel_size": 2}, 2, "fp32"),
    "pp2": ({"pipeline_model_parallel_size": 2}, 2, "fp32"),
    "pp2_interleaved": ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, 2, "fp32"),
    "dp2_bf16": ({}, 2, "bf16"),
    "cp2_bf16": ({"context_parallel_size": 2}, 2, "bf16"),
}


def small_config(corpus, directory, *, parallel, **changes):
    """Four layers with every kind of parameter, and a vocabulary of 420 that needs padding to 432."""
    model = {"model__num_layers": 4, "model__add_qkv_bias": True, "model__qk_layernorm": True}
    model["model__make_vocab_size_divisible_by"] = 16
    return change(tiny_config(corpus, directory), **model, parallel=parallel, **changes)


class Flights:
    """Counts forward passes whose backward pass has not begun."""

    now = most = 0

    def forward_ends(self, module, inputs, output) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        output.register_hook(self.backward_begins)

    def backward_begins(self, gradient) -> None:
        self.now -= 1


def held_on_this_rank(config) -> dict[str, int]:
    """Train one step on this rank; returns its stage, the bytes it holds, and the most micro-batches in flight."""
    from megatron_polar.data.steps import StepDataset
    from megatron_polar.train.build import build_run, join_ranks
    from megatron_polar.train.state_dict import sharded_state
    from megatron_polar.train.step import train_step

    device, topology = join_ranks(config)
    run = build_run(config, device, topology)
    batch = config.train.global_batch_size
    steps = StepDataset(run.data.train, global_batch_size=batch, rank=topology.dp_rank, shape=run.data.shape)
    flights = Flights()
    for core in run.model.cores:
        core.decoder.register_forward_hook(flights.forward_ends)
    train_step(
        run.model,
        optimizer=run.optimizer,
        step=steps[0],
        reduction=run.reduction,
        guard=run.guard,
        topology=topology,
        device=device,
    )
    parameters = [parameter for chunk in run.model.chunks for parameter in chunk.parameters()]
    optimizers = run.optimizer.chained_optimizers
    moments = [state[name] for one in optimizers for state in one.optimizer.state.values() for name in MOMENTS]
    fp32_weights = [weight for one in optimizers for group in one.shard_fp32_from_float16_groups for weight in group]
    return {
        "stage": topology.pp_rank,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weights": size_of(parameters),
        "gradients": size_of(parameter.main_grad for parameter in parameters),
        "optimizer": size_of(moments + fp32_weights),
        "in_flight": flights.most,
        "saving": most_gathered(
            lambda: sharded_state(run.model, optimizer=run.optimizer, topology=topology, is_loading=False)
        ),
    }


def most_gathered(gather) -> int:
    """Bytes of the largest all-gather of a function: what is sent, received, and once more NCCL's flat copy of that."""
    import torch.distributed as dist

    found, all_gather = [], dist.all_gather

    def watched(parts, part, *arguments):
        found.append(size_of([part]) + 2 * size_of(parts))
        return all_gather(parts, part, *arguments)

    dist.all_gather = watched
    try:
        gather()
    finally:
        dist.all_gather = all_gather
    return max(found)


def size_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_the_real_model_holds_is_what_was_estimated(name, trajectory_corpus, tmp_path):
    parallel, world_size, precision = LAYOUTS[name]
    config = small_config(trajectory_corpus, tmp_path, parallel=parallel, train__precision=precision)
    estimate = estimate_memory(config, world_size=world_size, embedding_rows=432)
    held = run_ranks(held_on_this_rank, world_size, config)
    for rank in held:
        stage = estimate.stages[rank["stage"]]
        assert rank["parameters"] == stage.num_parameters
        assert rank["weights"] == stage.weights
        assert rank["gradients"] == stage.gradients
        assert rank["in_flight"] == stage.in_flight
        # megatron-core pads each tensor to 64 numbers, which counts in a model as small as this.
        assert stage.saving <= rank["saving"] <= 1.15 * stage.saving
    # Shards are equal but for padding at tensors' ends, so data-parallel ranks are compared together.
    for stage in estimate.stages:
        total = sum(rank["optimizer"] for rank in held if rank["stage"] == stage.stage)
        assert total == stage.optimizer * world_size // parallel.get("pipeline_model_parallel_size", 1)


def test_a_save_gathers_a_bucket_at_a_time(seven_billion):
    """Sent, received and copied: 4/D + 4 + 4 bytes a weight."""

    def stages(*overrides, nodes=8):
        config = seven_billion("parallel.sequence_parallel=false", *overrides)
        return estimate_memory(config, world_size=8 * nodes, embedding_rows=92544).stages

    tp1, no_overlap = "parallel.tensor_model_parallel_size=1", "optimizer.overlap_grad_reduce=false"
    (whole,) = stages(tp1, no_overlap)
    numbers = PRESETS["polar_7b"].num_parameters(92544) - 4096  # the head is in a bucket of its own
    assert whole.saving == 8 * numbers + -(-4 * numbers // 64)
    assert whole.total == whole.states + whole.saving + whole.runtime
    # The first stage closes buckets at a million numbers a data-parallel rank, behind a weight: the embedding at most.
    (overlap,) = stages(tp1)
    numbers = 64_000_000 + 92544 * 4096
    assert overlap.saving == 8 * numbers + -(-4 * numbers // 64) < overlap.step
    assert overlap.total == overlap.states + overlap.step + overlap.runtime
    (few,) = stages(tp1, nodes=1)
    numbers = 40_000_000 + 92544 * 4096
    assert few.saving == 8 * numbers + numbers // 2
    # Later stages have one bucket for each chunk, whatever overlaps.
    for chunks in (1, 2):
        interleaved = [f"parallel.virtual_pipeline_model_parallel_size={chunks}"] if chunks > 1 else []
        later = stages(tp1, "parallel.pipeline_model_parallel_size=2", *interleaved)[1]
        layers = later.num_parameters - 2 * 4096  # without final norm and head
        numbers = layers // chunks + 4096
        assert later.saving == 8 * numbers + -(-4 * numbers // 32)
    assert stages(tp1, no_overlap, "optimizer.use_distributed_optimizer=false", "train.precision=fp32")[0].saving == 0


def test_fp8_weights_are_gathered_in_bf16_for_a_save(seven_billion):
    config = seven_billion(*FP8, "train.fp8_param_gather=true")
    (stage,) = estimate_memory(config, world_size=512, embedding_rows=92544).stages
    assert stage.saving == 2 * 30 * PRESETS["polar_7b"].layer_parameters // 2  # TP 2, and 30 layers in FP8


def test_a_plan_says_that_only_a_save_does_not_fit(capsys):
    example = str(ROOT / "examples/pretrain_7b.yaml")
    tp1 = ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]
    arguments = ["plan", example, "--no-paths", "--nodes", "8", *tp1, "optimizer.overlap_grad_reduce=false"]
    assert main(arguments) == USER_ERROR
    printed = capsys.readouterr()
    assert "gathered at a save, when 17.02 of a training step are gone" in printed.out
    assert "does not fit" in printed.out and "activations" not in printed.out
    assert "optimizer.overlap_grad_reduce=true would take 67.5 GB" in printed.err
    assert main([*arguments[:-1]]) == 0
    printed = capsys.readouterr()
    assert "gathered at a save" not in printed.out and "activations kept" in printed.out


def test_all_stages_together_are_the_whole_model():
    architecture = PRESETS["polar_72b"]
    layout = Layout(tp=1, pp=8, vpp=None, cp=1, dp=1, sequence_parallel=False)
    parts = [stage_parameters(architecture, embedding_rows=152064, layout=layout, stage=stage) for stage in range(8)]
    assert sum(parts) == architecture.num_parameters(152064)


# --- Activations, by hand --------------------------------------------------------------------------------------------


@pytest.fixture
def seven_billion():
    """examples/pretrain_7b.yaml with overrides."""

    def load(*overrides: str):
        return load_config(ROOT / "examples/pretrain_7b.yaml", overrides)

    return load


def test_one_layer_keeps_what_the_table_says(seven_billion):
    h, nd, gd, f = 4096, 32 * 128, 8 * 128, 14336
    config = seven_billion("train.recompute=none")
    layer = 4 * 2 * h + 8 + 2 * nd + 2 * 2 * 2 * gd + 4 * 32 + 2 * nd + 2 * 2 * f + 2 * f
    assert layer_activations(config, layout=ONE) == layer
    # Tensor parallelism splits what lies between linear layers, sequence parallelism the residual stream as well.
    tp2 = dataclasses.replace(ONE, tp=2)
    residual = 4 * 2 * h + 8
    assert layer_activations(config, layout=tp2) == residual + (layer - residual) // 2
    assert layer_activations(config, layout=dataclasses.replace(tp2, sequence_parallel=True)) == layer // 2
    # Selective: queries, keys, the unsplit QKV output and the attention's own.
    selective = layer - (2 * 2 * 2 * gd + 4 * 32) + 2 * gd + 2 * (nd + 2 * gd)
    assert layer_activations(seven_billion("train.recompute=selective"), layout=ONE) == selective
    packed = seven_billion("train.recompute=none", "data.layout=packed")
    assert layer_activations(packed, layout=ONE) == layer - 2 * 2 * gd
    assert layer_activations(config, layout=dataclasses.replace(ONE, cp=2)) == layer + 2 * nd


# --- FP8, by hand: Transformer Engine's tables stand in scaling/fp8.py -----------------------------------------------


FP8 = ("train.recompute=none", "data.pad_to_multiple=128", "train.fp8=tensorwise")


def test_an_fp8_layer_keeps_what_its_table_says(seven_billion):
    h, nd, f = 4096, 32 * 128, 14336
    config = seven_billion(*FP8)
    bf16 = layer_activations(config, layout=ONE)
    assert bf16 == layer_activations(seven_billion("train.recompute=none"), layout=ONE)
    change = -2 * h + nd - f
    assert layer_activations(config, layout=ONE, in_fp8=True) == bf16 + change
    tp2 = dataclasses.replace(ONE, tp=2, sequence_parallel=True)
    assert layer_activations(config, layout=tp2, in_fp8=True) == (bf16 + change) // 2
    blocks = seven_billion(*FP8, "train.fp8=blockwise")
    scales = (2 * h + nd + f) * 4 // 128
    assert layer_activations(blocks, layout=ONE, in_fp8=True) == bf16 + change + scales


def test_fp8_weights_stand_beside_or_in_the_place_of_those_in_bf16(seven_billion):
    def stage(*overrides, number=0):
        return estimate_memory(seven_billion(*overrides), world_size=8, embedding_rows=92544).stages[number]

    plain, copies = stage("train.recompute=none"), stage(*FP8)
    matrices = 30 * PRESETS["polar_7b"].layer_parameters // 2  # TP 2; one layer at each end stays in bf16
    assert (plain.fp8_weights, copies.fp8_weights) == (0, 2 * matrices)
    assert copies.weights == plain.weights
    alone = stage(*FP8, "train.fp8_param_gather=true")
    assert alone.fp8_weights == copies.fp8_weights
    assert alone.weights == plain.weights - 2 * matrices
    for one in (copies, alone):
        assert (one.gradients, one.optimizer) == (plain.gradients, plain.optimizer)
    delayed = stage(*FP8, "train.fp8=delayed", "train.fp8_bf16_layers=0")
    assert delayed.fp8_weights == 2 * matrices * 32 // 30


def test_layers_in_bf16_lie_on_the_first_and_the_last_stage(seven_billion):
    pipeline = [*FP8, "train.fp8_bf16_layers=2", "parallel.pipeline_model_parallel_size=4"]
    config = seven_billion(*pipeline)
    assert [num_fp8_layers(config, pp=4, stage=stage) for stage in range(4)] == [6, 8, 8, 6]
    assert [num_fp8_layers(config, pp=32, stage=stage) for stage in (0, 1, 2, 30, 31)] == [0, 0, 1, 0, 0]
    stages = estimate_memory(config, world_size=8, embedding_rows=92544).stages
    layout = dataclasses.replace(ONE, tp=2, sequence_parallel=True)
    bf16, fp8 = (layer_activations(config, layout=layout, in_fp8=x) for x in (False, True))
    row, angles, tokens = 2 * 4096 // 2, 4 * 128, 32768
    assert stages[1].activations == 3 * tokens * (8 * fp8 + angles + row)
    assert stages[3].activations == tokens * (2 * bf16 + 6 * fp8 + angles + 2 * row)


def test_the_plan_tells_fp8_weights_apart(capsys):
    arguments = ["plan", str(ROOT / "examples/pretrain_7b.yaml"), "--no-paths", "--nodes", "16"]
    assert main([*arguments, "train.fp8=tensorwise", "data.pad_to_multiple=128"]) == 0
    said = capsys.readouterr().out
    assert "bf16 with FP8 tensorwise" in said
    # 30 layers of a TP rank of two, a byte for each weight and one for its transpose.
    assert (
        f"{2 * 30 * PRESETS['polar_7b'].layer_parameters / 2 / 1e9:.2f}  weights in FP8, and their transposes" in said
    )
    assert main(arguments) == 0
    assert "in FP8" not in capsys.readouterr().out


def test_full_recomputation_keeps_block_inputs_and_one_block(seven_billion):
    tokens, row = 32768, 2 * 4096 // 2
    for block in (1, 4):
        config = seven_billion(f"train.recompute_num_layers={block}")
        stage = estimate_memory(config, world_size=8, embedding_rows=92544).largest
        assert stage.activations == tokens * (32 // block * row + 4 * 128 + row)
        assert stage.recomputed == tokens * block * layer_activations(config, layout=layout_of_two())


def layout_of_two() -> Layout:
    return dataclasses.replace(ONE, tp=2, sequence_parallel=True)


@pytest.mark.parametrize(
    ("pp", "vpp", "batch", "in_flight"),
    [
        (4, None, 32, [4, 3, 2, 1]),  # 1F1B: the first stage waits longest for its first gradient
        (4, None, 2, [2, 2, 2, 1]),  # no more than there are
        (4, 2, 32, [11, 9, 7, 5]),  # (V - 1)P chunks more, and two steps for every stage behind
        (1, None, 32, [1]),
    ],
)
def test_micro_batches_in_flight(pp, vpp, batch, in_flight, seven_billion):
    config = seven_billion(f"train.global_batch_size={batch}")
    layout = dataclasses.replace(ONE, pp=pp, vpp=vpp)
    assert [passes_in_flight(config, layout=layout, stage=stage) for stage in range(pp)] == in_flight


@pytest.mark.parametrize(
    ("layout", "k", "longest_response", "tokens"),
    [
        ("shared_prefix", 2, 5120, 16384 + 5121),
        ("shared_prefix", 4, 5120, 16384 + 3 * 5121),
        ("shared_prefix", 2, None, 16384 + 8191),
        ("packed", 2, 5120, 2 * 16384),
        ("padded", 4, 5120, 4 * 16384),
    ],
)
def test_the_longest_comparison(layout, k, longest_response, tokens, seven_billion):
    data = seven_billion(f"data.layout={layout}", f"data.candidates_per_comparison={k}").data
    assert longest_comparison(data, longest_response=longest_response) == tokens


def test_context_parallel_ranks_share_the_tokens_of_a_row(seven_billion):
    overrides = ("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false")
    one, two = (
        estimate_memory(
            seven_billion(*overrides, f"parallel.context_parallel_size={cp}"), world_size=8, embedding_rows=92544
        ).largest
        for cp in (1, 2)
    )
    assert two.activations == one.activations // 2
    assert two.optimizer == one.optimizer  # the optimizer's shards go over DP x CP


def test_a_world_that_the_sizes_do_not_divide_is_refused():
    with pytest.raises(UserError, match=r"12 GPUs are not a multiple .* \(4 x 2 x 1 = 8\).* a multiple of 8"):
        layout_of(ParallelSection(tensor_model_parallel_size=4, pipeline_model_parallel_size=2), world_size=12)


# --- The examples ----------------------------------------------------------------------------------------------------

EXAMPLES = ["pretrain_1_8b", "pretrain_7b", "pretrain_20b", "pretrain_72b", "finetune_7b"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_large_example_fits_and_its_comment_says_how(name, capsys):
    """The command in the YAML's comment is run: the estimate beside it must be the one that comes out."""
    text = (ROOT / f"examples/{name}.yaml").read_text()
    command = re.search(r"^#   megatron-polar (plan .*)$", text, re.M)[1]
    written = re.search(r"Estimate on (\d+) nodes of 8 H100-80GB.*?([\d.]+) GB a GPU of the 76", text, re.S)
    assert command.startswith(f"plan examples/{name}.yaml --nodes {written[1]} --no-paths")
    assert main(command.replace("examples/", f"{ROOT}/examples/").split()) == 0
    table = capsys.readouterr().out
    total = float(re.search(r"([\d.]+)  in all; 76.0 of 80 may be used: fits", table)[1])
    assert total == pytest.approx(float(written[2]), abs=0.051)


@pytest.mark.parametrize("name", ["pretrain_1_8b", "pretrain_7b", "pretrain_20b", "pretrain_72b"])
def test_pre_training_examples_follow_the_laws(name):
    config = load_config(ROOT / f"examples/{name}.yaml")
    sizes = SIZES[config.model.preset]
    assert config.train.global_batch_size == round(batch_size(sizes))
    assert config.optimizer.lr == pytest.approx(peak_learning_rate(sizes), rel=0.03)  # the paper rounds to 1.4e-5


def test_fine_tuning_has_the_papers_settings():
    config = load_config(ROOT / "examples/finetune_7b.yaml")
    assert (config.optimizer.lr, config.train.global_batch_size, config.train.num_epochs) == (2e-5, 320, 1.0)


# --- The plan --------------------------------------------------------------------------------------------------------

H100 = Cluster(1, gpus_per_node=2, gpu_memory_gb=80.0)


def plan_problems(config, *, cluster=H100, with_paths: bool = True) -> list[str]:
    return list(make_plan(config, cluster=cluster, with_paths=with_paths).problems)


def test_a_run_that_is_ready_has_no_problem(trajectory_corpus, tmp_path):
    config = change(tiny_config(trajectory_corpus, tmp_path / "run"), train__num_steps=None, train__num_epochs=1.0)
    plan = make_plan(config, cluster=H100)
    assert plan.problems == ()
    assert (plan.num_comparisons, plan.num_steps) == (80, 10)
    table = render_plan(plan, base_tokens=1e9)
    assert "80 comparisons" in table
    assert "10 of 8 comparisons = 1 epochs" in table
    assert "answers up to" in table
    assert "batch " in table and "peak learning rate" in table


def test_the_laws_are_not_applied_to_preferences(ranking_corpus, tmp_path):
    plan = make_plan(tiny_config(ranking_corpus, tmp_path), cluster=H100)
    assert "laws    none: the paper's are for pre-training" in render_plan(plan)


def test_tokens_of_the_data_are_counted_as_the_paper_does(trajectory_corpus, tmp_path):
    """Two full sequences a comparison, each with two halves: four mean halves."""
    config = change(tiny_config(trajectory_corpus, tmp_path), train__num_steps=10)  # 80 comparisons of K = 2
    plan = make_plan(config, cluster=H100)
    facts = plan.paths.train[0]
    assert f", {short(80 * 4 * facts.num_tokens / facts.num_halves)} tokens," in render_plan(plan, base_tokens=1e9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__tokenizer": "nowhere"}, ("data.tokenizer", "nowhere", "give a")),
        ({"data__max_sequence_length": 16}, ("data.max_sequence_length=16", "two answers", "set at least")),
        ({"train__init_from": "nowhere"}, ("train.init_from", "nowhere", "give a run directory")),
        ({"train__global_batch_size": 1}, ("train.global_batch_size=1", "2 data-parallel ranks", "use at least 2")),
        ({"model__vocab_size": 8}, ("model.vocab_size=8", "vocabulary of 420", "at least 420")),
        (
            {"train__num_steps": None, "train__num_epochs": 0.05},
            ("train.num_epochs=0.05", "80 comparisons", "lower the batch size"),
        ),
        (
            {
                "model__make_vocab_size_divisible_by": 1,
                "model__vocab_size": 421,
                "parallel": {"tensor_model_parallel_size": 2},
            },
            ("parallel.tensor_model_parallel_size=2", "421 rows", "make_vocab_size_divisible_by"),
        ),
        ({"parallel": {"pipeline_model_parallel_size": 4}}, ("2 GPUs", "1 x 4 x 1", "multiple of 4")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_every_problem_names_key_value_and_remedy(changes, words, trajectory_corpus, tmp_path):
    problems = plan_problems(change(tiny_config(trajectory_corpus, tmp_path), **changes))
    assert len(problems) == 1
    for word in words:
        assert word in problems[0]


def test_damaged_and_missing_datasets_are_named(trajectory_corpus, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(trajectory_corpus, damaged)
    (damaged / "corpus.bin").write_bytes(b"")
    config = change(tiny_config(damaged, tmp_path / "run"), data__validation=(DatasetSource(str(tmp_path / "none")),))
    problems = plan_problems(config)
    assert "data.train[0].path" in problems[0] and "corpus.bin is truncated" in problems[0]
    assert "data.validation[0].path" in problems[1] and "no such directory" in problems[1]
    assert len(problems) == 2  # and not that the vocabulary, which a dataset would tell, is unknown
    # Without a look at any path only the unknown vocabulary is left.
    assert [p.split()[0] for p in plan_problems(config, with_paths=False)] == ["model.vocab_size"]


@pytest.fixture(scope="module")
def trained(trajectory_corpus, tmp_path_factory) -> Path:
    """A run directory with a checkpoint."""
    directory = tmp_path_factory.mktemp("trained")
    run_training(change(tiny_config(trajectory_corpus, directory), train__num_steps=1, evaluation__interval=0))
    return directory


def test_a_checkpoint_of_another_shape_is_named(trained, trajectory_corpus, tmp_path):
    config = change(tiny_config(trajectory_corpus, tmp_path), train__init_from=str(trained), model__ffn_hidden_size=128)
    (problem,) = plan_problems(config)
    assert "was made with model.ffn_hidden_size=64, and this run has 128" in problem
    assert plan_problems(change(config, model__ffn_hidden_size=64)) == []


def test_what_would_fit_is_found_by_the_estimate_itself(seven_billion):
    cluster = Cluster(2, gpus_per_node=8, gpu_memory_gb=80.0)
    (problem,) = plan_problems(seven_billion("train.recompute=none"), cluster=cluster, with_paths=False)
    assert "memory: 115" in problem
    remedy, taken = re.search(r"; (\S+=.*) would take ([\d.]+) GB", problem).groups()
    again = make_plan(seven_billion("train.recompute=none", *remedy.split()), cluster=cluster, with_paths=False)
    assert again.problems == ()
    assert f"{again.memory.largest.total / 1e9:.1f}" == taken


def test_nothing_that_fits_is_said_plainly(seven_billion):
    config = seven_billion("model.preset=polar_72b", "model.vocab_size=152064")
    (problem,) = plan_problems(config, cluster=Cluster(1, gpus_per_node=8, gpu_memory_gb=80.0), with_paths=False)
    assert problem.endswith("take more or larger GPUs")


# --- The verb --------------------------------------------------------------------------------------------------------


def test_all_problems_come_at_once_with_status_2(tmp_path, capsys):
    arguments = ["plan", str(ROOT / "examples/pretrain_7b.yaml"), "train.recompute=none", "--nodes", "1"]
    assert main([*arguments, f"run.directory={tmp_path}", "--gpu-memory-gb", "40"]) == USER_ERROR
    printed = capsys.readouterr()
    assert "does not fit" in printed.out
    heading, *lines = printed.err.strip().split("\n")
    assert heading.endswith("1 node x 8 GPUs of 40 GB: 4 problems")
    assert [line.split("=")[0].split(":")[0].strip() for line in lines] == [
        "data.train[0].path",
        "data.validation[0].path",
        "train.init_from",
        "memory",
    ]


@pytest.mark.parametrize("amount", ["0", "-1", "nan", "3.6X"])
def test_amounts_are_numbers_above_0_with_or_without_a_prefix(amount, capsys):
    example = str(ROOT / "examples/pretrain_7b.yaml")
    with pytest.raises(SystemExit) as refused:
        main(["plan", example, "--no-paths", "--reward-tokens", amount])
    assert refused.value.code == USER_ERROR
    assert f"{amount!r} is no number above 0" in capsys.readouterr().err
    assert main(["plan", example, "--no-paths", "--reward-tokens", "3.6T"]) == 0
    assert "3.60T tokens" in capsys.readouterr().out


def test_a_run_on_cpus_is_planned_for_processes_and_without_the_memory_of_gpus(capsys):
    example = [str(ROOT / "examples/pretrain_7b.yaml"), "--no-paths", "run.device=cpu", "train.precision=fp32"]
    assert main(["plan", *example, "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]) == 0
    printed = capsys.readouterr().out
    assert "layout  1 CPU rank: TP 1" in printed
    assert "memory" not in printed
    assert main(["plan", *example]) == USER_ERROR
    assert "on 1 CPU rank: 1 problem" in capsys.readouterr().err
    assert main(["plan", *example, "--search"]) == USER_ERROR
    assert "--search is for GPUs" in capsys.readouterr().err


def test_lengths_that_are_assumed_are_said_to_be_and_impossible_ones_refused(capsys):
    example = [str(ROOT / "examples/pretrain_7b.yaml"), "--no-paths"]
    assert main(["plan", *example]) == 0
    assert "these lengths are assumed" in capsys.readouterr().out
    assert main(["plan", *example, "--prompt-tokens", "512", "--answer-tokens", "1126"]) == 0
    assert "assumed;" not in capsys.readouterr().out
    assert main(["plan", *example, "--prompt-tokens", "20000", "--answer-tokens", "1"]) == USER_ERROR
    assert "data.max_sequence_length=16384" in capsys.readouterr().err


def test_the_time_of_the_whole_run_is_told_where_its_steps_are_known(capsys):
    overrides = ["train.num_epochs=null", "train.num_steps=1000"]
    assert main(["plan", str(ROOT / "examples/pretrain_7b.yaml"), "--no-paths", "--nodes", "8", *overrides]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"hours for 1,000 steps, \d+ GPU-hours", printed)
    assert "steps   1,000 of 4343 comparisons" in printed


def test_an_unknown_vocabulary_is_no_reason_to_name_a_tokenizer_that_is_not_opened(capsys):
    example = [str(ROOT / "examples/pretrain_7b.yaml"), "--no-paths", "model.preset=tiny"]
    assert main(["plan", *example]) == USER_ERROR
    assert "set it, or leave out --no-paths" in capsys.readouterr().err
    on_cpus = ["run.device=cpu", "train.precision=fp32", "--gpus-per-node", "4"]
    assert main(["plan", *example, *on_cpus]) == 0, "memory, which wants the vocabulary, is not planned there"
    assert "x DP 2" in capsys.readouterr().out
    assert main(["plan", *example, *on_cpus, "train.global_batch_size=1"]) == USER_ERROR
    assert "less than one comparison for each of 2 data-parallel ranks" in capsys.readouterr().err


def test_the_search_finds_only_what_train_accepts(capsys):
    """FP8 bounds the pipeline by the layers that stay in bf16."""
    example = [str(ROOT / "examples/pretrain_72b.yaml"), "--no-paths", "--nodes", "16", "--search"]
    main(["plan", *example, "train.fp8=tensorwise", "train.fp8_bf16_layers=4"])  # the example's own layout does not fit
    printed = capsys.readouterr().out
    rows = printed[printed.index("search") :].split("\n\n")[1].splitlines()[1:]
    assert rows
    assert all(80 // 2 // int(row.split()[1]) >= 4 for row in rows)
    assert ("a pipeline stands where a tenth more" in printed) == any(int(row.split()[1]) > 1 for row in rows)


def test_the_search_overlaps_nothing_where_the_reduction_is_canonical(capsys):
    example = [str(ROOT / "examples/pretrain_1_8b.yaml"), "--no-paths", "--search", "train.canonical_reduction=true"]
    fp32 = ["train.precision=fp32", "optimizer.use_distributed_optimizer=false", "train.recompute=full"]
    overlap = ["optimizer.overlap_grad_reduce=false", "optimizer.overlap_param_gather=false"]
    assert main(["plan", *example, *fp32, *overlap]) == 0
    printed = capsys.readouterr().out
    assert " ".join(overlap) in printed[printed.index("the first of them") :]


def test_tensor_parallel_groups_of_the_search_do_not_straddle_nodes(capsys):
    example = [str(ROOT / "examples/pretrain_7b.yaml"), "--no-paths", "--nodes", "2", "--gpus-per-node", "6"]
    assert main(["plan", *example, "parallel.tensor_model_parallel_size=4", "--search"]) == 0
    printed = capsys.readouterr().out
    assert "note: tensor-parallel groups reach over nodes" in printed
    rows = printed[printed.index("search") :].split("\n\n")[1].splitlines()[1:]
    assert {row.split()[0] for row in rows} <= {"1", "2"}


@pytest.mark.parametrize("option", ["--nodes 0", "--gpus-per-node 0", "--gpu-memory-gb 0"])
def test_options_out_of_range_are_refused(option, capsys):
    example = str(ROOT / "examples/pretrain_7b.yaml")
    assert main(["plan", example, "--no-paths", *option.split()]) == USER_ERROR
    assert "must be" in capsys.readouterr().err


def test_the_plan_takes_no_torch(trajectory_corpus, tmp_path):
    (tmp_path / "run.yaml").write_text(dump_config(tiny_config(trajectory_corpus, tmp_path / "run")))
    program = (
        "import sys\nfrom megatron_polar.cli import main\n"
        f"status = main(['plan', {str(tmp_path / 'run.yaml')!r}])\n"
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[] 0"


def test_the_output_in_the_documentation_is_todays(capsys):
    text = (ROOT / "docs/training.md").read_text()
    command, output = re.search(r"^\$ megatron-polar (plan [^\n]*)\n(.*?)\n```", text, re.M | re.S).groups()
    assert main(command.replace("examples/", f"{ROOT}/examples/").split()) == 0
    assert capsys.readouterr().out.strip() == output
