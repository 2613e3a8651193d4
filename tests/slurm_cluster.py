"""A real Slurm cluster on this machine: slurmctld, munge and one slurmd for each node, in a directory of its own.

Every node has namespaces of its own for network, host name and mounts, and its own address on a bridge, so that nodes
can crash or be cut off one by one. Each declares eight GPUs (links to /dev/null) and more cores than there are:
nothing enforces them. Needs root and Debian's slurmctld, slurmd, slurm-client and munge; nothing outside of its
directory is changed but the network bridge, which `stop` takes away again.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")

_CONFIGURATION = """
ClusterName=mini
SlurmctldHost={host}({net}.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
PlugStackConfig={root}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
GresTypes=gpu
SlurmdTimeout=8
SlurmctldTimeout=10
KillWait=5
MinJobAge=600
ReturnToService=2
JobRequeue=1
MessageTimeout=10
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
PartitionName=gpu Nodes=node[1-{num_nodes}] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


@functools.cache
def missing() -> str | None:
    """Why no cluster can be started here; None when one can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge iproute2)"
    if os.getuid() != 0:
        return "network namespaces need root"
    name = f"probe{os.getpid() % 10_000}"
    probes = (
        ["unshare", "--net", "--uts", "--mount", "--propagation", "private", "true"],
        ["ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}b"],
        ["ip", "link", "del", name],
        ["ip", "link", "add", name, "type", "bridge"],
        ["ip", "link", "del", name],
    )
    for probe in probes:
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"`{' '.join(probe)}` is not possible here: {done.stderr.strip()}"
    return None


class Cluster:
    """Used as a context manager. `environment` is what Slurm's commands need."""

    def __init__(self, root: Path, *, num_nodes: int, plugin: Path | None = None):
        self.root, self.num_nodes, self._plugin = root, num_nodes, plugin
        self._number = os.getpid() % 200
        self._net, self._bridge = f"10.77.{self._number}", f"polar{self._number}"
        self._processes: dict[str, subprocess.Popen] = {}
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}
        for name in [
            name for name in self.environment if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"
        ]:
            del self.environment[name]

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    # --- Nodes -------------------------------------------------------------------------------------------------------

    def crash(self, node: int) -> None:
        """Every process of the node dies at once, and its link with them."""
        self.cut(node)
        for process in self.processes_on(node):
            os.kill(process, signal.SIGKILL)

    def cut(self, node: int) -> None:
        """Take the node off the network; its processes live on."""
        self._ip("link", "set", f"{self._bridge}n{node}", "down")

    def lose_daemon(self, node: int) -> None:
        """The node's slurmd dies alone: Slurm gives the node up, and its jobs live on with network and storage."""
        self._processes[f"slurmd{node}"].kill()

    def processes_on(self, node: int) -> list[int]:
        """All processes on a node but the one that holds its namespaces."""
        holder = self._processes[f"holder{node}"].pid
        network = os.readlink(f"/proc/{holder}/ns/net")
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != holder:
                try:
                    if os.readlink(entry / "ns" / "net") == network:
                        found.append(int(entry.name))
                except OSError:
                    pass
        return found

    def on_node(self, node: int, *command: str) -> None:
        """Run a command in a node's namespaces."""
        subprocess.run(self._enter(node) + list(command), check=True, capture_output=True)

    # --- Jobs --------------------------------------------------------------------------------------------------------

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        """One of Slurm's commands, or a script that uses them, from the top of the repository."""
        done = subprocess.run(
            list(command), env=self.environment | environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done

    def submit(self, *arguments: str, **environment: str) -> str:
        """Submit a job; returns its number."""
        return self.run("sbatch", "--parsable", *arguments, **environment).stdout.strip().splitlines()[-1]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, job: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job is in one of `states`; a requeued job is started at once instead of after two minutes."""
        deadline = time.monotonic() + seconds
        requeued_at: float | None = None
        while (found := self.job(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job} is {found['JobState']} after {seconds} s: {found}"
            if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime":
                requeued_at = requeued_at or time.monotonic()
                if time.monotonic() - requeued_at > 2:  # a node refuses what it has ended in the same second
                    self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            else:
                requeued_at = None
            time.sleep(0.2)
        return found

    # --- Starting and stopping ---------------------------------------------------------------------------------------

    def _start(self) -> None:
        for name in ("log", "state", "spool", "dev"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self._write_files()
        self._ip("link", "add", self._bridge, "type", "bridge")
        self._ip("addr", "add", f"{self._net}.1/24", "dev", self._bridge)
        self._ip("link", "set", self._bridge, "up")
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        files = ("munge.key", "munge.sock", "munged.pid", "log/munged.log", "munged.seed")
        options = [f"--{name}={self.root / file}" for name, file in zip(names, files, strict=True)]
        self._spawn("munged", "munged", "--foreground", "--force", *options)
        self._wait_for((self.root / "munge.sock").exists, "munge")
        self._spawn("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        for node in range(1, self.num_nodes + 1):
            self._add_node(node)

        def are_up() -> bool:
            idle = self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).stdout.split()
            return len(set(idle)) == self.num_nodes

        self._wait_for(are_up, "all nodes")

    def _write_files(self) -> None:
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        shape = {"root": self.root, "host": socket.gethostname(), "net": self._net, "num_nodes": self.num_nodes}
        nodes = [
            f"NodeName=node{node} NodeHostname=node{node} NodeAddr={self._address(node)} Port={17000 + node} CPUs=192 "
            f"Sockets=1 CoresPerSocket=192 ThreadsPerCore=1 RealMemory=512000 Gres=gpu:8 State=UNKNOWN"
            for node in range(1, self.num_nodes + 1)
        ]
        text = _CONFIGURATION.format(port=16800 + self._number, **shape)
        partition = text.index("PartitionName")
        (self.root / "slurm.conf").write_text(text[:partition] + "\n".join(nodes) + "\n" + text[partition:])
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for gpu in range(8):
            (self.root / "dev" / f"nvidia{gpu}").symlink_to("/dev/null")
        (self.root / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.root}/dev/nvidia[0-7]\n")
        (self.root / "plugstack.conf").write_text(f"required {self._plugin}\n" if self._plugin else "")
        hosts = [f"{self._address(node)} node{node}" for node in range(1, self.num_nodes + 1)]
        own = ["127.0.0.1 localhost", f"{self._net}.1 {socket.gethostname()}"]
        (self.root / "hosts").write_text("\n".join(own + hosts) + "\n")
        # There is no DNS in a node: looking an address up would take ten seconds.
        (self.root / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")

    def _add_node(self, node: int) -> None:
        (self.root / "spool" / f"node{node}").mkdir()
        mark = self.root / f"node{node}.ready"
        program = (
            f"set -e; hostname node{node}; mount --bind {self.root}/hosts /etc/hosts; "
            f"mount --bind {self.root}/nsswitch.conf /etc/nsswitch.conf; touch {mark}; exec sleep infinity"
        )
        self._spawn(
            f"holder{node}", "unshare", "--net", "--uts", "--mount", "--propagation", "private", "sh", "-c", program
        )
        self._wait_for(mark.exists, f"node{node}'s namespaces")
        link, holder = f"{self._bridge}n{node}", str(self._processes[f"holder{node}"].pid)
        self._ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", holder)
        self._ip("link", "set", link, "master", self._bridge, "up")
        for command in (
            ["link", "set", "lo", "up"],
            ["addr", "add", f"{self._address(node)}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["route", "add", "default", "via", f"{self._net}.1"],
        ):
            self.on_node(node, "ip", *command)
        slurmd = ["slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", f"node{node}"]
        self._spawn(f"slurmd{node}", *self._enter(node), *slurmd)

    def stop(self) -> None:
        """End everything that was started."""
        for node in range(1, self.num_nodes + 1):
            if f"holder{node}" in self._processes:
                for process in self.processes_on(node):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
        for process in self._processes.values():
            process.kill()
            process.wait()
        for node in range(1, self.num_nodes + 1):
            # The namespace of a node that crashed may outlive it for a minute.
            subprocess.run(["ip", "link", "del", f"{self._bridge}n{node}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)

    def _spawn(self, name: str, *command: str) -> None:
        with (self.root / "log" / f"{name}.out").open("wb") as output:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env=self.environment,
            )  # fmt: skip

    def _wait_for(self, is_there, what: str) -> None:
        deadline = time.monotonic() + 30
        while not is_there():
            for name, process in self._processes.items():
                output = self.root / "log" / f"{name}.out"
                assert process.poll() is None, f"{name} has ended: {output.read_text(errors='replace')[-2000:]}"
            assert time.monotonic() < deadline, f"{what} did not come up in 30 s"
            time.sleep(0.05)

    def _enter(self, node: int) -> list[str]:
        return ["nsenter", "-t", str(self._processes[f"holder{node}"].pid), "-n", "-u", "-m"]

    def _address(self, node: int) -> str:
        return f"{self._net}.{10 + node}"

    def _ip(self, *arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
