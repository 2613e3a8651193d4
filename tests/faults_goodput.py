"""A simulated run that fails again and again, with the accounts that run.py and metrics.py would keep of it."""

import random
from pathlib import Path

import orjson

from megatron_polar.train.journal import goodput, last_sign_of_life, read_events, read_rows


def goodput_trace(directory: Path, *, seed: int, num_steps: int = 50_000) -> dict:
    """Steps of 1 s, a save every 200 that stalls 2 s, failures every 2,000 s on average, restarts after 60 s.

    Returns the ratio that `goodput` finds, the one that the simulation kept account of, and the one expected: of every
    span of I steps and a save (I + 2 s), failures cost the restart and half a span on average.
    """
    choose = random.Random(seed)
    interval, stall, restart, mean = 200, 2.0, 60.0, 2_000.0
    directory.mkdir(parents=True, exist_ok=True)
    clock, done, saved = 1e9, 0, 0
    kept: dict[int, dict] = {}
    account = {"restarts": -1, "lost_steps": 0, "stall_seconds": 0.0}
    begun = clock
    while done < num_steps:
        rows = [orjson.dumps(row) for row in kept.values()]
        (directory / "metrics.jsonl").write_bytes(b"\n".join(rows) + b"\n" * bool(rows))
        found = last_sign_of_life(directory, resumed_at=saved)
        if found:
            found["last_sign"] = clock - restart  # the file's own time is not the simulation's
        _append(directory, {"time": clock, "event": "start", "step": saved, "origin": "", **found})
        account["restarts"] += 1
        account["lost_steps"] += done - saved
        kept = {step: row for step, row in kept.items() if step <= saved}
        done = saved
        failure = clock + choose.expovariate(1 / mean)
        while done < num_steps and clock + 1.0 <= failure:
            clock, done = clock + 1.0, done + 1
            kept[done] = {"iteration": done, "iteration-time": 1.0}
            if done % interval == 0 and clock + stall <= failure:
                clock, saved = clock + stall, done
                account["stall_seconds"] += stall
                save = {"step": done, "problem": None, "seconds": stall, "stalled_seconds": stall}
                _append(directory, {"time": clock, "event": "save", **save})
        if done < num_steps:
            clock = failure + restart
    (directory / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in kept.values()))
    _append(directory, {"time": clock, "event": "done", "step": done})
    result = goodput(read_events(directory), read_rows(directory))
    lost = mean / (interval + stall)  # spans between two failures
    expected = mean * interval / (interval + stall) * (1 - 0.5 / lost) / (mean + restart)
    simulated = num_steps / (clock - begun)
    return {
        "ettr": result.ettr,
        "simulated": simulated,
        "analytic": expected,
        "relative_error": abs(result.ettr / simulated - 1),
        "accounts_agree": (result.restarts, result.lost_steps, result.stall_seconds)
        == (account["restarts"], account["lost_steps"], account["stall_seconds"]),
        "restarts": result.restarts,
        "lost_steps": result.lost_steps,
    }


def goodput_traces(workdir: Path, *, seed: int, num_traces: int = 60) -> dict:
    """Many traces: the worst disagreement with a trace's own account, and the mean ratio against the expected one."""
    traces = [goodput_trace(workdir / str(n), seed=seed + n, num_steps=20_000) for n in range(num_traces)]
    mean = sum(trace["ettr"] for trace in traces) / num_traces
    return {
        "traces": num_traces,
        "ettr": mean,
        "analytic": traces[0]["analytic"],
        "relative_error_to_account": max(trace["relative_error"] for trace in traces),
        "relative_error_to_analytic": abs(mean / traces[0]["analytic"] - 1),
        "accounts_agree": all(trace["accounts_agree"] for trace in traces),
    }


def _append(directory: Path, event: dict) -> None:
    with (directory / "events.jsonl").open("ab") as file:
        file.write(orjson.dumps(event) + b"\n")
