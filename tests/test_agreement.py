"""What ranks tell one another: four ranks that believe to be on two machines, `a` and `b`."""

import os
import socket

import pytest
from ranks import run_ranks

from megatron_polar.config.schema import ParallelSection
from megatron_polar.errors import MACHINE_DIFFERS, RunStopped, UserError
from megatron_polar.parallel import agreement, topology
from megatron_polar.parallel.device import select_device

HOSTS = ("a", "a", "b", "b")


def meet() -> int:
    rank = int(os.environ["RANK"])
    socket.gethostname = lambda: HOSTS[rank]
    topology.initialize(ParallelSection(), device=select_device("cpu", local_rank=0))
    return rank


def outcome(function, *arguments):
    """What it returns or raises, with the parts that this rank was asked to check."""
    try:
        return function(*arguments)
    except UserError as error:
        return type(error), getattr(error, "status", None), str(error), getattr(error, "machine", None)


def raising(ranks):
    rank = meet()
    return outcome(agreement.raise_everywhere, UserError(f"{rank} has no file") if rank in ranks else None)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((), None),
        ((2, 3), "rank 2 on b: 2 has no file (2 of 4 ranks find nothing wrong)"),
        ((0, 1, 2, 3), "0 has no file"),
    ],
)
def test_a_fault_of_some_ranks_is_raised_on_all_and_names_the_machine(ranks, message):
    assert run_ranks(raising, 4, ranks) == [message and (UserError, None, message, None)] * 4


def choosing(choices):
    rank = meet()
    return outcome(agreement.agree_on, "model.transformer_impl", choices[rank])


def test_a_choice_that_one_rank_has_made_otherwise_is_refused():
    assert run_ranks(choosing, 4, ("local",) * 4) == [None] * 4
    said = run_ranks(choosing, 4, ("transformer_engine", "transformer_engine", "local", "transformer_engine"))
    assert said == said[:1] * 4
    assert said[0][2].startswith("model.transformer_impl is transformer_engine on rank 0 (a) and local on rank 2 (b); ")


def checking(bad, blind):
    """`bad`: parts that are damaged; `blind`: ranks that find damage in everything."""
    rank, parts = meet(), []

    def check(*, part, of):
        assert of == len(HOSTS)
        parts.append(part)
        if part in bad or rank in blind:
            return f"part {part} is damaged"
        return None

    return outcome(agreement.check_in_parts, "step_4", check), parts


def test_damage_that_two_machines_see_is_damage_and_only_its_part_is_read_again():
    found = run_ranks(checking, 4, (1,), ())
    assert [outcome for outcome, _ in found] == [["part 1 is damaged"]] * 4
    assert [parts for _, parts in found] == [[0], [1], [2, 1], [3]]


def test_a_machine_that_alone_sees_damage_is_named_and_the_run_ends():
    outcomes = [outcome for outcome, _ in run_ranks(checking, 4, (), (1,))]
    assert outcomes == outcomes[:1] * 4
    kind, status, message, machine = outcomes[0]
    assert (kind, status, machine) == (RunStopped, MACHINE_DIFFERS, "a")
    assert message.startswith("step_4: rank 1 on a has found damage where rank 2 on b reads the same without a fault: ")
    assert "part 1 is damaged; look at the memory and the mounts of a, and start again without it" in message


def test_on_one_machine_nobody_else_can_look():
    found = run_ranks(checking_on_one_machine, 2)
    assert found == [["part 1 is damaged"]] * 2


def checking_on_one_machine():
    topology.initialize(ParallelSection(), device=select_device("cpu", local_rank=0))
    return agreement.check_in_parts("step_4", lambda part, of: "part 1 is damaged" if part == 1 else None)


def refusing():
    rank = meet()

    def check(*, part, of):
        if part == 3:
            raise UserError("step_4: format 9 is unknown")

    return outcome(agreement.check_in_parts, "step_4", check), rank


def test_what_a_check_raises_is_raised_on_all_ranks():
    message = "step_4: format 9 is unknown"
    assert run_ranks(refusing, 4) == [((UserError, None, message, None), rank) for rank in range(4)]
