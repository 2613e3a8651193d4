"""Do the ranks meet, add rightly, and at what speed? Plain torch.distributed: the model's groups need not exist yet.

It goes from the small to the large, because a wait of all for all names nobody: first every rank says that it is here,
then those of one node add, then all. Neighbouring nodes also exchange data in pairs: where the whole is slow, that
tells whose links are. The only module of this package with torch.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Literal

import orjson
import torch
import torch.distributed as dist

from megatron_polar.errors import UserError
from megatron_polar.launch.deadline import Deadline
from megatron_polar.launch.report import AllReduce, Place

MIB = 2**20
_CPU_BYTES, _CUDA_BYTES = 64 * MIB, 512 * MIB
_CHECKED_BYTES = 16 * MIB
_EXCHANGED_SHARE = 4  # the whole is divided by this
_LATENCY_REPEATS, _BANDWIDTH_REPEATS = 20, 5
_LONG_SECONDS = 0.5
"""An all-reduce that takes longer is timed once only: many CPU ranks on one machine need seconds for each."""


class Measurement:
    """One rank's part. `result` grows from stage to stage, so that another thread can write down how far it came."""

    def __init__(self, place: Place, *, device: Literal["auto", "cuda", "cpu"], deadline: Deadline):
        self.place, self._deadline = place, deadline
        self._patience = timedelta(seconds=2 * deadline.seconds + 60)  # longer than the deadline, which says more
        self._wanted_device = device
        self.can_meet = False
        """Whether this rank has all that it needs of its own node, and waits for others from now on."""
        self.result = AllReduce(num_ranks=place.world_size)
        self._other_connection: dist.Store | None = None

    def run(self) -> AllReduce:
        """Meet and measure; what all ranks of the node have found is in the result of its first."""
        self._deadline.phase("this rank's device")
        self._device, backend = _select_device(self._wanted_device, local_rank=self.place.local_rank)
        self._num_bytes = _CUDA_BYTES if self._device.type == "cuda" else _CPU_BYTES
        self.result = replace(self.result, backend=backend)
        self._meet()
        self._deadline.phase(f"the {backend} process group of all ranks")
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", self._store),
            rank=self.place.rank,
            world_size=self.place.world_size,
            timeout=self._patience,
        )
        self._deadline.phase("the all-reduce of this node's ranks")
        self._add_in_node()
        self._deadline.phase("the small all-reduce of all ranks")
        self._add_everywhere()
        self._deadline.phase("the exchanges with the neighbouring nodes")
        self.result = replace(self.result, exchanges=self._exchange())
        self._deadline.phase("the large all-reduce of all ranks")
        self.result = replace(self.result, bandwidth_gb_s=self._bandwidth(self.place.world_size))
        self._share()
        return self.result

    def close(self) -> None:
        """Leave; whoever hosts the store stays until all others have."""
        self._deadline.phase("the other ranks to leave")
        self._store.add("left", 1)
        if self.place.rank == 0:
            self._wait_for_all("left")
        dist.destroy_process_group()

    def arrived(self) -> dict[str, int] | None:
        """Ranks that have come, per node; None where not even the store was reached. For another thread, while `run`
        waits for the others."""
        if self._other_connection is None:
            return None
        come = [f"here/{rank}" for rank in range(self.place.world_size)]
        store = dist.PrefixStore(self._prefix, self._other_connection)
        nodes = [orjson.loads(store.get(key))[0] for key in come if store.check([key])]
        return {node: nodes.count(node) for node in dict.fromkeys(nodes)}

    # --- Meeting ---

    def _meet(self) -> None:
        place = self.place
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
        has_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        hosts = place.rank == 0 and not has_launcher
        self.can_meet = not hosts
        self._deadline.phase(f"rank 0 at {address}:{port}")
        store = dist.TCPStore(address, port, is_master=hosts, wait_for_workers=False, timeout=self._patience)
        self.can_meet = True
        self._prefix = f"preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._other_connection = store.clone()  # `run` locks its own while it waits
        self._store = dist.PrefixStore(self._prefix, store)
        me = [place.node, place.local_rank, self.result.backend]
        self._store.set(f"here/{place.rank}", orjson.dumps(me))
        self._store.add("here", 1)
        self._deadline.phase(f"all {place.world_size} ranks to come")
        self._wait_for_all("here")
        ranks = range(place.world_size)
        places = [orjson.loads(text) for text in self._store.multi_get([f"here/{rank}" for rank in ranks])]
        self._ranks: dict[str, dict[int, int]] = {}
        """Node -> local rank -> rank; nodes in the order of their first ranks."""
        for rank, (node, local_rank, _) in enumerate(places):
            self._ranks.setdefault(node, {})[local_rank] = rank
        self._pass("meeting")
        others = [(rank, *other) for rank, other in enumerate(places) if other[2] != self.result.backend]
        if others:
            rank, node, _, backend = others[0]
            raise UserError(
                f"rank {place.rank} ({place.node}) would talk by {self.result.backend}, rank {rank} ({node}) by "
                f"{backend}: torch sees GPUs on one of them only; check its driver, or set run.device for all"
            )

    def _wait_for_all(self, key: str) -> None:
        while self._store.add(key, 0) < self.place.world_size:
            time.sleep(max(0.02, self.place.world_size / 2000))  # the store answers all ranks, one after the other

    def _pass(self, stage: str) -> None:
        self.result = replace(self.result, stages=(*self.result.stages, stage))

    # --- Adding ---

    def _add_in_node(self) -> None:
        mine = sorted(self._ranks[self.place.node].values())
        if len(mine) > 1:
            # Only its members take part in making the group: a sick node does not hold up the others here.
            group = dist.new_group(mine, timeout=self._patience, use_local_synchronization=True)
            self._is_wrong_in_node = self._is_wrong(mine, group)
            self.result = replace(self.result, node_bandwidth_gb_s=self._bandwidth(len(mine), group))
        else:
            self._is_wrong_in_node = False
        self._pass("node")

    def _add_everywhere(self) -> None:
        number = torch.zeros(1, device=self._device)
        latency = self._time(lambda: dist.all_reduce(number), repeats=_LATENCY_REPEATS)
        clock = time.time()
        self.result = replace(self.result, latency_us=latency * 1e6, clock_unix_seconds=clock)
        self._is_wrong_everywhere = self._is_wrong(list(range(self.place.world_size)), None)
        self._pass("all")

    def _is_wrong(self, ranks: list[int], group: dist.ProcessGroup | None) -> bool:
        """Add numbers that are other ones at every place and on every rank, small enough to be exact in fp32."""
        pattern = torch.arange(_CHECKED_BYTES // 4, device=self._device, dtype=torch.float32) % 1021
        numbers = pattern + self.place.rank
        dist.all_reduce(numbers, group=group)
        return not torch.equal(numbers, pattern * len(ranks) + sum(ranks))

    def _bandwidth(self, num_ranks: int, group: dist.ProcessGroup | None = None) -> float | None:
        """Bus bandwidth in GB/s: each link carries 2 (n - 1) / n of the data, whatever n is."""
        numbers = torch.zeros(self._num_bytes // 4, device=self._device)
        seconds = self._time(lambda: dist.all_reduce(numbers, group=group), repeats=1)
        slowest = torch.tensor([seconds], device=self._device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
        if slowest.item() < _LONG_SECONDS:
            seconds = self._time(lambda: dist.all_reduce(numbers, group=group), repeats=_BANDWIDTH_REPEATS)
        return 2 * (num_ranks - 1) / num_ranks * self._num_bytes / seconds / 1e9 if num_ranks > 1 else None

    def _time(self, action: Callable[[], None], *, repeats: int) -> float:
        """Median of seconds, after one that is not counted: it connects."""
        seconds = []
        for _ in range(repeats + 1):
            start = time.monotonic()
            action()
            self._synchronize()
            seconds.append(time.monotonic() - start)
        return statistics.median(seconds[1:])

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    # --- Pairs of nodes ---

    def _exchange(self) -> dict[str, float]:
        """Swap data with the ranks of the same number on the neighbouring nodes, in a ring; GB/s in each direction."""
        nodes, found = list(self._ranks), {}
        num_bytes = self._num_bytes // _EXCHANGED_SHARE
        ours, theirs = (torch.zeros(num_bytes // 4, device=self._device) for _ in range(2))
        for pairs in rounds_of_a_ring(len(nodes)):
            partner = next((nodes[b] for a, b in pairs if nodes[a] == self.place.node), None)
            partner = partner or next((nodes[a] for a, b in pairs if nodes[b] == self.place.node), None)
            peer = self._ranks[partner].get(self.place.local_rank) if partner else None
            if peer is None:
                continue

            def swap(peer: int = peer) -> None:
                pair = [dist.P2POp(dist.isend, ours, peer), dist.P2POp(dist.irecv, theirs, peer)]
                for work in dist.batch_isend_irecv(pair):
                    work.wait()

            found[partner] = num_bytes / self._time(swap, repeats=3) / 1e9
        return found

    # --- The results ---

    def _share(self) -> None:
        """Tell the node's first rank what this one has found; the first one waits for all of its node."""
        self._deadline.phase("the results of this node's ranks")
        mine = [self._is_wrong_in_node, self._is_wrong_everywhere, self.result.exchanges]
        self._store.set(f"result/{self.place.rank}", orjson.dumps(mine))
        if self.place.local_rank == 0:
            ranks = sorted(self._ranks[self.place.node].values())
            found = [orjson.loads(text) for text in self._store.multi_get([f"result/{rank}" for rank in ranks])]
            neighbours = dict.fromkeys(node for _, _, exchanges in found for node in exchanges)
            self.result = replace(
                self.result,
                wrong_in_node=tuple(rank for rank, (wrong, _, _) in zip(ranks, found, strict=True) if wrong),
                wrong_ranks=tuple(rank for rank, (_, wrong, _) in zip(ranks, found, strict=True) if wrong),
                exchanges={
                    node: min(exchanges[node] for _, _, exchanges in found if node in exchanges) for node in neighbours
                },
            )
        self._pass("done")


def _select_device(
    kind: Literal["auto", "cuda", "cpu"], *, local_rank: int
) -> tuple[torch.device, Literal["nccl", "gloo"]]:
    """As parallel/device.py, which would load megatron-core."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device=cuda, but torch sees no GPU; check the driver and the torch build")
    if kind == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu"), "gloo"
    count = torch.cuda.device_count()
    index = 0 if count == 1 and "SLURM_LOCALID" in os.environ else local_rank
    if index >= count:
        raise UserError(f"local rank {local_rank} finds {count} GPU(s); start at most {count} ranks on a node")
    torch.cuda.set_device(index)
    torch.zeros(1, device="cuda")  # a sick GPU fails here, before anybody waits for it
    return torch.device("cuda", index), "nccl"


def rounds_of_a_ring(num_nodes: int) -> list[list[tuple[int, int]]]:
    """All pairs of neighbours in a ring of nodes, in rounds in which no node has two partners."""
    if num_nodes < 2:
        return []
    line = [(node, node + 1) for node in range(num_nodes - 1)]
    rounds = [line[0::2], line[1::2]]
    if num_nodes > 2:
        closing = (num_nodes - 1, 0)
        rounds = [line[0::2], [*line[1::2], closing]] if num_nodes % 2 == 0 else [*rounds, [closing]]
    return [pairs for pairs in rounds if pairs]
