"""Who is named by a preflight's judge: the node that differs, and nobody for what all nodes share."""

import dataclasses
import subprocess
import sys

import pytest

from megatron_polar.cli import main
from megatron_polar.errors import DONE, PREFLIGHT_FAILED, USER_ERROR, UserError
from megatron_polar.launch.judge import Limits, judge
from megatron_polar.launch.preflight import parse_nodes
from megatron_polar.launch.report import (
    AllReduce,
    DatasetState,
    Failure,
    Gpu,
    NodeReport,
    read_evidence,
    write_failure,
    write_report,
)
from megatron_polar.launch.verdict import render

ALL_STAGES = ("meeting", "node", "all", "done")


# --- Made-up reports -------------------------------------------------------------------------------------------------


def gpus(count: int = 8, **changes) -> tuple[Gpu, ...]:
    gpu = Gpu(0, "NVIDIA H100 80GB HBM3", "550.54.15", 81559, 345, 1980, "Enabled", 0)
    return tuple(dataclasses.replace(gpu, index=index, **changes) for index in range(count))


def good_all_reduce(**changes) -> AllReduce:
    values = {
        "stages": ALL_STAGES,
        "num_ranks": 32,
        "backend": "nccl",
        "latency_us": 31.0,
        "bandwidth_gb_s": 370.0,
        "node_bandwidth_gb_s": 440.0,
        "clock_unix_seconds": 1.8e9,
    }
    return AllReduce(**{**values, **changes})


def good_node(name: str, **changes) -> NodeReport:
    """Node `n3` has the ranks 16 to 23."""
    values = {
        "node": name,
        "job": "",
        "rank": 8 * (int(name.lstrip("n")) - 1),
        "num_local_ranks": 8,
        "device": "auto",
        "gpus": gpus(),
        "free_gb": {"run.directory": 500.0, "TMPDIR": 90.0},
        "versions": {"Python": "3.11.7", "torch": "2.6.0", "commit": "a" * 40},
        "datasets": (DatasetState("/data/train", "1" * 64, ""),),
        "all_reduce": good_all_reduce(),
    }
    return NodeReport(**{**values, **changes})


def nodes(count: int = 4, **changes_of_nodes) -> list[NodeReport]:
    """Good nodes, but for `n2={...}`."""
    return [good_node(f"n{i}", **changes_of_nodes.get(f"n{i}", {})) for i in range(1, count + 1)]


def broken(reason: str) -> DatasetState:
    return DatasetState("/data/train", "1" * 64, reason)


def test_good_nodes_pass():
    verdict = judge(nodes(), expected=("n1", "n2", "n3", "n4"))
    assert (verdict.status, verdict.bad_nodes, verdict.problems) == (DONE, (), ())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": gpus(9)}, ["number of GPUs is 9, and 8 on most nodes"]),
        ({"gpus": gpus(name="NVIDIA A100-SXM4-80GB")}, ["model is NVIDIA A100"]),
        ({"gpus": gpus(driver="535.104.05")}, ["driver is 535.104.05, and 550.54.15 on most nodes"]),
        ({"gpus": gpus(max_sm_clock_mhz=1755)}, ["1755 MHz, and 1980 MHz"]),
        ({"gpus": (*gpus(7), dataclasses.replace(gpus(8)[7], uncorrected_errors=2))}, ["GPU 7", "2 uncorrected ECC"]),
        ({"gpus": (), "gpu_error": "nvidia-smi did not answer within 60 s"}, ["did not answer"]),
        ({"gpus": (), "num_allocated_gpus": 8}, ["no GPU is seen, and Slurm has given the job 8 here"]),
        ({"gpus": gpus(7)}, ["7 GPUs for 8 ranks"]),
        ({"gpus": gpus(8), "num_local_ranks": 9}, ["8 GPUs for 9 ranks"]),
        ({"visible_gpus": 4}, ["4 GPUs for 8 ranks"]),
        ({"free_gb": {"run.directory": 500.0, "TMPDIR": 0.2}}, ["0.2 GB are free in TMPDIR", "--min-free-gb 1"]),
        ({"clock_offset_seconds": -7.0}, ["7.0 s ahead of the file system"]),
        ({"versions": {"Python": "3.11.7", "torch": "2.5.1", "commit": "a" * 40}}, ["torch is 2.5.1, and 2.6.0"]),
        ({"versions": {"Python": "3.11.7", "torch": "2.6.0"}}, ["commit is missing"]),
        ({"datasets": (broken("corpus.bin is truncated"),)}, ["dataset /data/train: corpus.bin is truncated"]),
        ({"datasets": (DatasetState("/data/train", "2" * 64, ""),)}, ["manifest of dataset /data/train is 2222"]),
        ({"missing_inputs": {"train.init_from": "/base"}}, ["train.init_from=/base is not there"]),
        ({"all_reduce": good_all_reduce(backend="gloo")}, ["gloo, and nccl on most nodes"]),
        ({"all_reduce": good_all_reduce(clock_unix_seconds=1.8e9 - 6)}, ["6.0 s behind the others"]),
        ({"all_reduce": good_all_reduce(wrong_ranks=(17,))}, ["wrong sum over all ranks, on rank 17"]),
    ],
)
def test_the_node_that_differs_is_named_with_the_reason(changes, words):
    reports = nodes(n3=changes)
    verdict = judge(reports, expected=4)
    lines = [line for line in render(verdict, reports).splitlines() if line.startswith("n3: ")]
    assert (verdict.status, verdict.bad_nodes) == (PREFLIGHT_FAILED, ("n3",))
    assert len(lines) == 1
    assert all(word in lines[0] for word in words)
    assert "; " in lines[0]  # the remedy


@pytest.mark.parametrize(
    "changes",
    [
        {"datasets": (DatasetState("/data/train", None, "no such directory"),)},
        {"missing_inputs": {"data.tokenizer": "/gone"}},
        {"free_gb": {"run.directory": 0.1}},
        {"num_local_ranks": 16},
        {"versions": {"torch": "2.13.0+cpu"}},
        {"versions": {"torch": "2.13.0", "transformer-engine": None}, "needs_transformer_engine": True},
        {"gpus": (), "num_allocated_gpus": 8},
        {"all_reduce": None},
        {"all_reduce": good_all_reduce(bandwidth_gb_s=3.0)},
        {"all_reduce": AllReduce(stages=("meeting",), waited_for="the all-reduce")},
    ],
)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_all_nodes_share_is_the_users_to_mend_and_nobody_is_excluded(changes, count):
    reports = nodes(count, **{f"n{i}": changes for i in range(1, count + 1)})
    verdict = judge(reports, expected=count, limits=Limits(min_bandwidth_gb_s=100.0))
    assert (verdict.status, verdict.bad_nodes) == (USER_ERROR, ())
    assert len(verdict.problems) == 1
    assert "all nodes: " in render(verdict, reports)


def test_broken_hardware_is_never_the_users_mistake():
    verdict = judge(nodes(1, n1={"gpus": gpus(uncorrected_errors=1)}), expected=1)
    assert (verdict.status, verdict.bad_nodes) == (PREFLIGHT_FAILED, ("n1",))


def test_a_common_mistake_goes_before_a_bad_node_and_both_are_shown():
    missing = {"missing_inputs": {"data.tokenizer": "/gone"}}
    verdict = judge(nodes(2, n1=missing, n2={**missing, "gpus": gpus(uncorrected_errors=1)}), expected=2)
    assert (verdict.status, verdict.bad_nodes) == (USER_ERROR, ("n2",))


# --- Who is believed -------------------------------------------------------------------------------------------------


def test_of_two_nodes_that_differ_the_later_in_the_node_list_is_named():
    reports = nodes(2, n2={"versions": {"Python": "3.11.7", "torch": "2.5.1", "commit": "a" * 40}})
    verdict = judge(reports, expected=("n1", "n2"))
    assert verdict.bad_nodes == ("n2",)
    assert "no majority: the later in the node list is named" in str(verdict.problems[0])
    assert judge(reports, expected=("n2", "n1")).bad_nodes == ("n1",)


def test_of_two_nodes_that_differ_the_one_whose_files_do_not_fit_is_named():
    reports = nodes(2, n1={"datasets": (DatasetState("/data/train", "2" * 64, "corpus.bin is too long"),)})
    verdict = judge(reports, expected=("n1", "n2"))
    assert verdict.bad_nodes == ("n1",)
    assert len(verdict.problems) == 1


def test_two_against_two_the_first_of_the_list_is_believed():
    other = {"gpus": gpus(driver="535.104.05")}
    assert judge(nodes(n1=other, n4=other), expected=4).bad_nodes == ("n2", "n3")


# --- Who is missing --------------------------------------------------------------------------------------------------


def test_a_node_without_a_report_is_named_and_the_others_who_waited_for_it_are_not():
    waiting = {"all_reduce": AllReduce(waited_for="all 32 ranks to come", arrived={"n1": 8, "n2": 8, "n3": 8})}
    reports = nodes(3, n1=waiting, n2=waiting, n3={"all_reduce": None})
    verdict = judge(reports, expected=("n1", "n2", "n3", "n4"))
    assert (verdict.status, verdict.bad_nodes) == (PREFLIGHT_FAILED, ("n4",))
    assert "no report !" in render(verdict, reports)


def test_a_missing_node_without_a_name_is_counted():
    verdict = judge(nodes(3), expected=4)
    assert (verdict.status, verdict.bad_nodes) == (PREFLIGHT_FAILED, ())
    assert "1 of 4 nodes have left no report" in str(verdict.problems[0])


def test_no_report_at_all_excludes_nobody():
    verdict = judge([], expected=("n1", "n2"))
    assert (verdict.status, verdict.bad_nodes) == (USER_ERROR, ())


def hung(*stages: str, **changes) -> dict:
    return {"all_reduce": AllReduce(stages=stages, waited_for="something", **changes)}


@pytest.mark.parametrize(
    ("n1", "n2", "n3", "reason"),
    [
        (hung(arrived={"n1": 8, "n2": 5, "n3": 8}), hung(), hung(), "5 of its 8 ranks came"),
        (hung(), {"all_reduce": None}, hung(), "ended without a word"),
        (hung("meeting", "node"), hung("meeting"), hung("meeting", "node"), "did not reach the node's own all-reduce"),
        ({}, hung("meeting", "node", "all"), {}, "did not reach the end"),
    ],
)
def test_where_all_hang_the_one_they_wait_for_is_named(n1, n2, n3, reason):
    verdict = judge(nodes(3, n1=n1, n2=n2, n3=n3), expected=3)
    assert verdict.bad_nodes == ("n2",)
    assert reason in str(verdict.problems[0])


def test_where_most_hang_those_that_met_an_error_are_named():
    """A dead InfiniBand port: all have met over TCP, and added over NVLink within each node."""
    far = ("meeting", "node")
    dead = {"all_reduce": AllReduce(stages=far, error="ncclSystemError: no route")}
    others = {f"n{number}": hung(*far) for number in (1, 3, 4, 5)}
    verdict = judge(nodes(5, n2=dead, **others), expected=5)
    assert (verdict.status, verdict.bad_nodes) == (PREFLIGHT_FAILED, ("n2",))
    assert "failed where most others only waited: ncclSystemError: no route" in str(verdict.problems[0])
    rail = [
        Failure("n4", "", 27, "NET/IB : port error", is_among_others=True)
    ]  # of a rank that is not the node's first
    assert judge(nodes(5, n2=hung(*far), **others), failures=rail, expected=5).bad_nodes == ("n4",)
    everywhere = [Failure(f"n{number}", "", 8 * number, "lost a peer", is_among_others=True) for number in range(1, 6)]
    assert judge(nodes(5, n2=hung(*far), **others), failures=everywhere, expected=5).status == USER_ERROR


def test_a_rank_that_failed_by_itself_explains_the_silence_of_the_others():
    failures = [Failure("n2", "", rank, "torch sees no GPU") for rank in (8, 9)]
    verdict = judge(nodes(3, n1=hung(), n2={"all_reduce": None}, n3={"all_reduce": None}), failures=failures)
    assert verdict.bad_nodes == ("n2",)
    assert "2 ranks from 8 on failed: torch sees no GPU" in str(verdict.problems[0])


def test_the_node_with_the_slow_links_is_named_where_the_whole_is_slow():
    exchanges = {
        "n1": {"n2": 9.0, "n4": 40.0},
        "n2": {"n1": 9.0, "n3": 10.0},
        "n3": {"n2": 10.0, "n4": 40.0},
        "n4": {"n3": 40.0, "n1": 40.0},
    }
    slow = {
        node: {"all_reduce": good_all_reduce(bandwidth_gb_s=60.0, exchanges=pairs)} for node, pairs in exchanges.items()
    }
    verdict = judge(nodes(**slow), expected=4, limits=Limits(min_bandwidth_gb_s=100.0))
    assert verdict.bad_nodes == ("n2",)
    assert judge(nodes(**slow), expected=4).status == DONE


def test_a_wrong_sum_within_a_node_explains_the_wrong_sums_of_all():
    reports = nodes(
        2,
        n1={"all_reduce": good_all_reduce(wrong_ranks=(0, 1))},
        n2={"all_reduce": good_all_reduce(wrong_ranks=(8,), wrong_in_node=(9,))},
    )
    assert judge(reports, expected=2).bad_nodes == ("n2",)


def test_machines_without_gpus_are_no_problem_and_slowed_gpus_are_a_note():
    cpu = {"gpus": (), "visible_gpus": 8}
    assert judge(nodes(2, n1=cpu, n2=cpu), expected=2).status == DONE
    hot = {"gpus": gpus(throttle_reasons=("sw_power_cap", "hw_thermal_slowdown"))}
    verdict = judge(nodes(2, n1=hot), expected=2)
    assert verdict.status == DONE
    assert "n1: GPU 0 is slowed down now by hw_thermal_slowdown" in verdict.notes


def test_the_table_has_a_line_per_node_in_aligned_columns():
    reports = nodes(12, n2={"gpus": gpus(7)})
    lines = render(judge(reports, expected=12), reports).splitlines()
    assert lines[0].split()[:3] == ["node", "ranks", "GPUs"]
    assert lines[2].startswith("BAD  n2    8-15   7 x NVIDIA H100 80GB HBM3 !")
    assert lines[12].startswith("ok   n12   88-95  8 x NVIDIA H100 80GB HBM3  ")
    assert "31 us, 370 GB/s" in lines[1]
    assert lines[-1] == "preflight: 11 of 12 nodes are good; bad: n2"


# --- Reports as files ------------------------------------------------------------------------------------------------


def test_a_report_survives_its_file_and_those_of_another_job_are_set_aside(tmp_path):
    mine = good_node("n1", job="7.1")
    write_report(tmp_path, mine)
    write_report(tmp_path, good_node("n2", job="7.0"))
    write_failure(tmp_path, Failure("n1", "7.1", 3, "why"))
    (tmp_path / "n3.json").write_text('{"node": "n3"}')
    evidence = read_evidence(tmp_path, job="7.1")
    assert (evidence.reports, evidence.failures) == ((mine,), (Failure("n1", "7.1", 3, "why"),))
    assert "left by job 7.0" in evidence.strange["n2.json"]
    assert "no report of this version" in evidence.strange["n3.json"]


def test_judging_writes_the_bad_nodes_and_needs_no_torch(tmp_path):
    for report in nodes(3, n2={"gpus": gpus(7)}):
        write_report(tmp_path, report)
    code = (
        "import sys; from megatron_polar.cli import main; status = main(sys.argv[1:]); "
        "print('torch' in sys.modules); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "preflight", "--judge", str(tmp_path), "--nodes", "n[1-4]"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == PREFLIGHT_FAILED
    assert result.stdout.splitlines()[-1] == "False"
    assert (tmp_path / "bad_nodes").read_text() == "n2\nn4\n"
    assert main(["preflight", "--judge", str(tmp_path), "--nodes", "n1,n3"]) == DONE
    assert (tmp_path / "bad_nodes").read_text() == ""


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("4", 4),
        ("n1,n2", ("n1", "n2")),
        ("n1 n2\nn3", ("n1", "n2", "n3")),
        ("gpu[08-10,12]-ib,login", ("gpu08-ib", "gpu09-ib", "gpu10-ib", "gpu12-ib", "login")),
        ("r[1-2]n[1-2]", ("r1n1", "r1n2", "r2n1", "r2n2")),
    ],
)
def test_node_lists_are_read_as_slurm_writes_them(text, names):
    assert parse_nodes(text) == names


@pytest.mark.parametrize("text", ["", "n[1-", "n[a-b]", "n[1-99999999]"])
def test_a_broken_node_list_is_refused(text):
    with pytest.raises(UserError, match="--nodes"):
        parse_nodes(text)
