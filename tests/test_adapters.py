"""verl, OpenRLHF, TRL and ms-swift get the reward of prompt, reference and answer, in order, or an error."""

import asyncio
import importlib.util
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from flaky_server import FlakyServer, native, ok, value_of

from megatron_polar.errors import UserError
from megatron_polar.serve import adapters, reward_function
from megatron_polar.serve.client import RewardError
from megatron_polar.serve.reward_function import RewardFunction, RewardSettings, configured, strip_thinking

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "rl"


def reward_of(prompt: str, reference: str, output: str, wrapper: str | None = None) -> float:
    return value_of([prompt, reference, output, wrapper])


@pytest.fixture
def server():
    with FlakyServer(lambda request: ok(native(request))) as server:
        yield server


@pytest.fixture
def configure(server, monkeypatch):
    """Set MEGATRON_POLAR_REWARD_* variables for a test; the server's URL is set already."""

    def set_variables(**values):
        configured.cache_clear()
        for name, value in values.items():
            monkeypatch.setenv(f"MEGATRON_POLAR_REWARD_{name}", value)

    set_variables(URL=server.url)
    yield set_variables
    if configured.cache_info().currsize:
        configured().client.close()
    configured.cache_clear()


# --- thinking ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("ba ke", "ba ke"),
        ("", ""),
        ("<think>\nhm\n</think>\n\nba", "ba"),
        ("  <think></think>ba ", "ba "),
        ("<think>hm</think>", ""),
        ("hm, the template opened it\n</think>\nba", "ba"),
        ("<think>hm", None),
        ("</think>ba<think>", None),
        ("ba <think>hm</think> ke", None),
        ("<think>a</think>b<think>c</think>d", None),
        ("<think><think>a</think>b", None),
        ("<think>a</think>b</think>c", None),
        ("a</think>b</think>c", None),
        ("<Think>hm</Think>ba", "<Think>hm</Think>ba"),
    ],
)
def test_thinking_is_stripped_from_well_formed_answers_alone(text, answer):
    assert strip_thinking(text) == answer


def function_of(server, **settings) -> RewardFunction:
    return RewardFunction(RewardSettings(url=(server.url,), **settings))


OUTPUTS = ["<think>hm</think>ba", "<think>hm", "ke"]


def score(function: RewardFunction, outputs=OUTPUTS):
    with function.client:
        count = len(outputs)
        return function.rewards(prompts=["p"] * count, references=["r"] * count, outputs=outputs)


def test_where_thinking_is_required_an_answer_without_its_end_is_malformed(server):
    """The template has opened the block, and the token limit has come before its end: these are thoughts."""
    outputs = ["thoughts</think>ba", "thoughts that are cut o"]
    penalty = function_of(server, think="required", malformed_think="penalty", malformed_think_reward=-3.0)
    assert score(penalty, outputs) == [reward_of("p", "r", "ba"), -3.0]
    with pytest.raises(RewardError, match="or not there") as caught:
        score(function_of(server, think="required"), outputs)
    assert caught.value.indices == (1,)


def test_a_malformed_think_block_is_an_error_unless_its_worth_is_said(server):
    with pytest.raises(RewardError) as caught:
        score(function_of(server))
    assert caught.value.indices == (1,)
    assert "MEGATRON_POLAR_REWARD_MALFORMED_THINK=keep" in str(caught.value)
    assert server.requests == []


def test_a_malformed_think_block_can_be_kept_or_given_a_fixed_reward(server):
    plain = [reward_of("p", "r", "ba"), reward_of("p", "r", "<think>hm"), reward_of("p", "r", "ke")]
    assert score(function_of(server, malformed_think="keep")) == plain
    penalty = function_of(server, malformed_think="penalty", malformed_think_reward=-3.0, mean=-10.0, std=10.0)
    assert score(penalty) == [(plain[0] + 10) / 10, -3.0, (plain[2] + 10) / 10]


def test_thinking_is_stripped_from_every_turn_of_a_conversation(server):
    turns = [{"role": "assistant", "content": f"<think>{word}</think>{word}"} for word in ("ba", "ke")]
    assert score(function_of(server), [turns] * 3) == [reward_of("p", "r", "ba\nke")] * 3


# --- the function ------------------------------------------------------------------------------------------------


def test_rewards_are_raw_unless_normalisation_is_asked_for(server):
    raw = [reward_of("p", "r", word) for word in ("a", "b", "c")]
    assert score(function_of(server), ["a", "b", "c"]) == raw
    normalised = score(function_of(server, mean=-5.0, std=10.0), ["a", "b", "c"])
    assert normalised == [(reward + 5) / 10 for reward in raw]


def test_errors_name_the_place_among_all_outputs(server):
    server.answer = lambda request: ok(native(request, lambda item, output: math.nan if output == "bad" else 1.0))
    settings = {"malformed_think": "penalty", "malformed_think_reward": 0.0, "retries": 0}
    with pytest.raises(RewardError) as caught:
        score(function_of(server, **settings), ["<think>", "ok", "bad"])
    assert caught.value.indices == (2,)
    assert "not finite" in caught.value.reason


def test_columns_of_different_lengths_are_refused(server):
    function = function_of(server)
    with pytest.raises(UserError, match="2 prompts, 1 references and 1 outputs"):
        function.rewards(prompts=["a", "b"], references=["c"], outputs=["d"])


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({}, "set MEGATRON_POLAR_REWARD_URL"),
        ({"URL": " , "}, "set MEGATRON_POLAR_REWARD_URL"),
        ({"URL": "http://a:1", "TIMEOUT": "3"}, "MEGATRON_POLAR_REWARD_TIMEOUT is not known"),
        ({"URL": "http://a:1", "RETRIES": "many"}, "MEGATRON_POLAR_REWARD_RETRIES='many' is not a number"),
        ({"URL": "http://a:1", "MALFORMED_THINK": "skip"}, "malformed_think='skip'"),
        ({"URL": "http://a:1", "THINK": "always"}, "think='always'"),
        ({"URL": "http://a:1", "MALFORMED_THINK": "penalty"}, "give both or neither"),
        ({"URL": "http://a:1", "MALFORMED_THINK_REWARD": "0"}, "give both or neither"),
        ({"URL": "http://a:1", "MEAN": "-10"}, "give both"),
        ({"URL": "http://a:1", "MEAN": "-10", "STD": "0"}, "std above 0"),
        ({"URL": "http://a:1", "MEAN": "nan", "STD": "10"}, "finite"),
        ({"URL": "http://a:1", "WRAPPER": "chat"}, "wrapper='chat'"),
    ],
)
def test_wrong_variables_are_refused_by_name(variables, part):
    environment = {f"MEGATRON_POLAR_REWARD_{name}": value for name, value in variables.items()}
    with pytest.raises(UserError) as caught:
        RewardSettings.from_environment(environment)
    assert part in str(caught.value)


def test_every_setting_can_be_given_by_the_environment():
    variables = {
        "URL": "http://a:1, http://b:2",
        "ENGINE": "vllm",
        "TOKENIZER": "export",
        "MODEL": "polar",
        "LAYOUT": "sequence-classification",
        "COMPAT": "official",
        "MAX_SEQUENCE_LENGTH": "8192",
        "MAX_RESPONSE_LENGTH": "2048",
        "BATCH_SIZE": "4",
        "MAX_CONCURRENCY": "2",
        "TIMEOUT_SECONDS": "30",
        "DEADLINE_SECONDS": "90.5",
        "RETRIES": "3",
        "API_KEY_FILE": "key",
        "WRAPPER": "pretrain",
        "THINK": "required",
        "MALFORMED_THINK": "penalty",
        "MALFORMED_THINK_REWARD": "-1",
        "MEAN": "-10",
        "STD": "10",
        "REFERENCE_COLUMN": "solution",
        "END_TOKENS": "<end>,</s>",
    }
    environment = {f"MEGATRON_POLAR_REWARD_{name}": value for name, value in variables.items()}
    settings = RewardSettings.from_environment(environment | {"PATH": "x"})
    assert {name: str(getattr(settings, name.lower())) for name in variables} == variables | {
        "URL": "('http://a:1', 'http://b:2')",
        "TIMEOUT_SECONDS": "30.0",
        "MALFORMED_THINK_REWARD": "-1.0",
        "MEAN": "-10.0",
        "STD": "10.0",
        "END_TOKENS": "('<end>', '</s>')",
    }
    assert set(vars(settings)) == {name.lower() for name in variables}


def test_the_client_is_made_as_the_settings_say(monkeypatch):
    made = {}
    monkeypatch.setattr(reward_function, "RewardClient", lambda urls, **options: made.update(urls=urls, **options))
    settings = RewardSettings(url=("http://a:1",), engine="vllm", tokenizer="export", batch_size=3, retries=1)
    settings.open_client()
    assert made.pop("urls") == ("http://a:1",)
    assert made == {name: getattr(settings, name) for name in made}
    assert {"engine", "tokenizer", "compat", "layout", "deadline_seconds", "api_key_file"} <= set(made)


# --- verl --------------------------------------------------------------------------------------------------------


def test_verl_gets_the_reward_of_one_answer(configure):
    messages = [{"role": "user", "content": "p"}, {"role": "user", "content": "q"}]
    arguments = {"data_source": "x", "solution_str": "<think>a</think>b", "ground_truth": "r"}
    wanted = {"score": reward_of("p\nq", "r", "b")}
    assert adapters.compute_score(**arguments, extra_info={"prompt": messages}) == wanted
    # What a parquet reader makes of message lists, and arguments that later versions of verl pass.
    arrays = {"prompt": np.array(messages, dtype=object)}
    truth = np.array([{"role": "assistant", "content": "r"}], dtype=object)
    extra = {"reward_router_address": None, "reward_model_tokenizer": None}
    assert adapters.compute_score(**arguments | {"ground_truth": truth}, extra_info=arrays, **extra) == wanted
    assert asyncio.run(adapters.compute_score_async(**arguments, extra_info=arrays)) == wanted


def test_verl_gets_the_rewards_of_a_batch(configure, server):
    configure(BATCH_SIZE="64")
    numbers = range(40)
    rewards = adapters.compute_score_batch(
        data_sources=["x"] * 40,
        solution_strs=np.array([f"a{i}" for i in numbers], dtype=object),
        ground_truths=[f"r{i // 8}" for i in numbers],
        extra_infos=[{"prompt": f"p{i // 8}"} for i in numbers],
    )
    assert rewards == [{"score": reward_of(f"p{i // 8}", f"r{i // 8}", f"a{i}")} for i in numbers]
    assert [len(item["outputs"]) for item in server.requests[0].body["items"]] == [8] * 5


@pytest.mark.parametrize("extra_info", [None, {}, {"index": 3}])
def test_verl_data_without_a_prompt_is_refused(extra_info, configure):
    with pytest.raises(RewardError, match='extra_info has no "prompt"'):
        adapters.compute_score("x", "a", "r", extra_info)


# --- OpenRLHF ----------------------------------------------------------------------------------------------------


def test_openrlhf_gets_rewards_scores_and_logs(configure):
    prompts = ["<|im_start|>user\np<|im_end|>\n", "p", "q", "q"]
    answers = ["a<|im_end|>\n", "b</s></s>", "c", "<think>d</think>e<|endoftext|>"]
    labels = [{"prompt": "p", "reference": "r"}, "r", [{"role": "assistant", "content": "r"}], {"reference": "r"}]
    found = adapters.reward_func([p + a for p, a in zip(prompts, answers, strict=True)], prompts, labels)
    wanted = [reward_of(*texts) for texts in (("p", "r", "a"), ("p", "r", "b"), ("q", "r", "c"), ("q", "r", "e"))]
    assert found["rewards"] == wanted
    assert found["scores"] == pytest.approx([1 / (1 + math.exp(-reward)) for reward in wanted])
    assert found["extra_logs"] == {"polar_reward": wanted}


def test_openrlhf_scores_stay_between_0_and_1(configure, server):
    server.answer = lambda request: ok(native(request, lambda item, output: float(output)))
    found = adapters.reward_func(["p-5000", "p5000", "p0"], ["p"] * 3, ["r"] * 3)
    assert found["scores"] == [0.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("query", "label", "part"),
    [
        ("other text", "r", "does not begin with its prompt"),
        ("pa", None, "--data.label_key"),
        ("pa", "", "--data.label_key"),
        ("pa", 3, "a string"),
    ],
)
def test_openrlhf_data_without_prompt_or_reference_is_refused(query, label, part, configure):
    with pytest.raises(RewardError) as caught:
        adapters.reward_func(["pa", query], ["p", "p"], ["r", label])
    assert caught.value.indices == (1,)
    assert part in str(caught.value)


# --- TRL and ms-swift --------------------------------------------------------------------------------------------


def test_trl_gets_rewards_of_texts_and_conversations(configure, server):
    columns = {"completion_ids": [[1], [2]], "trainer_state": None, "reference": ["r", "s"]}
    found = adapters.trl_reward(prompts=["p", "q"], completions=["a", "b"], **columns)
    assert found == [reward_of("p", "r", "a"), reward_of("q", "s", "b")]

    def said(text):
        return [{"role": "user", "content": text}]

    texts = {name: [said(text) for text in value] for name, value in (("prompts", "pq"), ("completions", "ab"))}
    references = [said("r"), "s"]
    with function_of(server).client as client:
        polar_function = RewardFunction(RewardSettings(url=(server.url,)), client)
        polar_reward = adapters.make_trl_reward(polar_function)
        assert polar_reward(**texts, reference=references) == found
        another = adapters.make_trl_reward(polar_function, name="another")
        assert another(**texts, reference=references) == found
    # TRL's names for them in logs: two of one name would be averaged there.
    assert [polar_reward.__name__, another.__name__] == ["polar_reward", "another"]


def test_the_reference_column_can_be_named(configure):
    with pytest.raises(UserError, match=r"no column 'reference' \(it has solution\)"):
        adapters.trl_reward(prompts=["p"], completions=["a"], solution=["r"])
    configure(REFERENCE_COLUMN="solution")
    assert adapters.trl_reward(prompts=["p"], completions=["a"], solution=["r"]) == [reward_of("p", "r", "a")]


def test_swift_gets_rewards_of_what_its_messages_end_with(configure):
    messages = [[{"role": "user", "content": "p"}, {"role": "assistant", "content": answer}] for answer in ("a", "b")]
    found = adapters.swift_reward(["a", "b"], messages=messages, reference=["r", "r"], trainer_state=None)
    assert found == [reward_of("p", "r", "a"), reward_of("p", "r", "b")]
    with pytest.raises(RewardError) as caught:
        adapters.swift_reward(["a", "c"], messages=messages, reference=["r", "r"])
    assert caught.value.indices == (1,)
    with pytest.raises(UserError, match="no `messages`"):
        adapters.swift_reward(["a"], reference=["r"])


# --- examples ----------------------------------------------------------------------------------------------------


def load_example(name: str) -> types.ModuleType:
    """Load a file by its path, as the frameworks do."""
    spec = importlib.util.spec_from_file_location("loaded_by_path", EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_verl_example_works_when_loaded_by_its_path(configure):
    module = load_example("verl/reward.py")
    row = {"solution_str": "a", "ground_truth": "r", "extra_info": {"prompt": "p"}, "data_source": "x"}
    wanted = {"score": reward_of("p", "r", "a")}
    assert module.compute_score(**row) == wanted
    assert module.compute_score_batch(**{f"{name}s": [value] for name, value in row.items()}) == [wanted]
    assert asyncio.run(module.compute_score_async(**row)) == wanted


def test_the_openrlhf_example_gives_tensors(configure):
    import torch

    found = load_example("openrlhf/reward_func.py").reward_func(["pa"], ["p"], ["r"])
    assert torch.equal(found["rewards"], torch.tensor([reward_of("p", "r", "a")]))
    assert {name: type(value) for name, value in found["extra_logs"].items()} == {"polar_reward": torch.Tensor}


@pytest.mark.parametrize("place", ["swift.rewards", "swift.plugin"])
def test_the_swift_example_registers_itself(place, configure, monkeypatch):
    """With ms-swift's two names for the place of its base class, 4 and 3."""

    class ORM:
        def __init__(self, args=None, **kwargs):
            self.args = args

    package, module = types.ModuleType("swift"), types.ModuleType(place)
    module.ORM, module.orms = ORM, {}
    monkeypatch.setitem(sys.modules, "swift", package)
    monkeypatch.setitem(sys.modules, place, module)
    load_example("swift/plugin.py")
    reward = module.orms["polar"](args=None)
    messages = [[{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]]
    assert reward(["a"], messages=messages, reference=["r"]) == [reward_of("p", "r", "a")]


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.sh")), ids=lambda path: path.parent.name)
def test_the_launch_fragments_are_valid_shell(path):
    assert subprocess.run(["bash", "-n", str(path)], check=False, capture_output=True).returncode == 0
