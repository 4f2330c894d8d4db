"""Run a real SLURM of several nodes on a single machine, on loopback only, for tests and drills.

    python tests/slurm/mini_slurm.py up DIR [--nodes 2] [--cpus 2] [--proctrack cgroup]
    export SLURM_CONF=DIR/slurm.conf
    python tests/slurm/mini_slurm.py down DIR

Needs root and the Debian packages: apt-get install --no-install-recommends slurm-wlm munge. All files are in DIR. The
daemons are stopped by the process ids that they recorded there. Two partitions share the nodes: `high` preempts `low`.
"""

import argparse
import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

FREEZER = Path("/sys/fs/cgroup/freezer")
"""The only control group that SLURM needs to track the processes of a job."""

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")

# Why each line is there:
# - NoCtldInAddrAny, NoInAddrAny: listen on 127.0.0.1 instead of all interfaces.
# - task/none, jobacct_gather/none, accounting_storage/none: no systemd, no database. As on many real
#   clusters, sacct does not work.
# - ProctrackType decides which processes get a signal: under cgroup, which nearly all clusters use, only the batch
#   script and the tasks; under linuxproc also their children.
# - config_overrides: use the number of CPUs below instead of the machine's.
# - cred_expire: a requeued job does not start before its old credential has expired (120 s by default).
# - KillWait: seconds between TERM and KILL at a cancellation. GraceTime: the same at a preemption.
# - Weight: jobs go to the first node while it has room, so that tests know their node.
# - SlurmdTimeout: seconds after which a node that does not answer is marked down and its jobs are requeued.
CONF = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preempt_signal}
KillWait=60
ReturnToService=2
SlurmdTimeout={node_timeout}
SlurmctldTimeout=30
InactiveLimit=0
MinJobAge=600
MessageTimeout=30
"""


def missing(proctrack: str = "linuxproc") -> str:
    """Return the reason why SLURM cannot run here, or an empty string."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install --no-install-recommends slurm-wlm munge)"
    if os.geteuid() != 0:
        return "needs root"
    if proctrack == "cgroup" and not os.access(FREEZER, os.W_OK):
        return f"{FREEZER} is not writable, and proctrack/cgroup needs it"
    return ""


def node_names(folder: Path, nodes: int, proctrack: str) -> list[str]:
    """Return n1, n2, ..., with a prefix under cgroup, because clusters on a machine share the control groups."""
    prefix = hashlib.sha256(str(folder).encode()).hexdigest()[:6] if proctrack == "cgroup" else ""
    return [f"{prefix}n{number}" for number in range(1, nodes + 1)]


def write_files(
    folder: Path, *, nodes: int, cpus: int, preempt_signal: bool, node_timeout_s: int, grace_s: int, proctrack: str
) -> None:
    """Write all files that the daemons read."""
    for name in ("munge", "state", "spool", "log", "run"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for path in (folder, folder / "munge"):
        path.chmod(0o711)
    key = folder / "munge" / "key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
    conf = folder / "slurm.conf"
    ports = _read_ports(conf) or _free_ports(nodes + 1)
    lines = [
        CONF.format(
            host=socket.gethostname().partition(".")[0],
            port=ports[0],
            folder=folder,
            preempt_signal="SlurmctldParameters=preempt_send_user_signal" if preempt_signal else "",
            node_timeout=node_timeout_s,
            proctrack=proctrack,
        ).strip()
    ]
    memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    for weight, (name, port) in enumerate(zip(node_names(folder, nodes, proctrack), ports[1:], strict=True), start=1):
        lines.append(
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
            f"RealMemory={memory_mib} Weight={weight} State=UNKNOWN"
        )
        (folder / "spool" / name).mkdir(exist_ok=True)
    shared = "Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO"
    lines.append(f"PartitionName=low {shared} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}")
    lines.append(f"PartitionName=high {shared} Default=NO PriorityTier=10 PreemptMode=OFF")
    conf.write_text("\n".join(lines) + "\n")
    # SLURM 22.05 has no cgroup plugin `disabled`, and cgroup/v2 needs systemd. v1 loads even without mounted groups.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


def up(folder: Path, *, nodes: int = 2, cpus: int = 2, preempt_signal: bool = True, node_timeout_s: int = 15,
       grace_s: int = 60, proctrack: str = "linuxproc") -> None:  # fmt: skip
    """Start the daemons and wait until all nodes are idle."""
    if missing(proctrack):
        sys.exit(f"SLURM cannot run here: {missing(proctrack)}")
    folder = folder.resolve()
    assert not set(str(folder)) & set(" ,"), "slurm.conf cannot quote"
    write_files(folder, nodes=nodes, cpus=cpus, preempt_signal=preempt_signal, node_timeout_s=node_timeout_s,
                grace_s=grace_s, proctrack=proctrack)  # fmt: skip
    munge, conf = folder / "munge", folder / "slurm.conf"
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    if not _alive(folder / "run" / "munged.pid"):
        (munge / "socket").unlink(missing_ok=True)
        # --force: the folder belongs to root, not to the user munge
        _run("munged", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket", f"--seed-file={munge}/seed",
             f"--pid-file={folder}/run/munged.pid", f"--log-file={folder}/log/munged.log")  # fmt: skip
        _wait_for(lambda: (munge / "socket").exists(), "munged", folder)
    if not _alive(folder / "run" / "slurmctld.pid"):
        _run("slurmctld", "-f", str(conf), environment=environment)
    for name in node_names(folder, nodes, proctrack):
        start_node(folder, name)

    def ready() -> bool:
        command = ["sinfo", "--noheader", "--Node", "--partition=low", "--states=idle", "--format=%N"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return len(set(done.stdout.split())) == nodes

    _wait_for(ready, "slurmctld", folder)


def start_node(folder: Path, name: str) -> None:
    """Start the daemon of a node unless it is running."""
    if not _alive(folder / "run" / f"slurmd.{name}.pid"):
        conf = folder / "slurm.conf"
        _run("slurmd", "-f", str(conf), "-N", name, environment={**os.environ, "SLURM_CONF": str(conf)})


def node_pid(folder: Path, name: str) -> int:
    """Return the process id of the daemon of a node."""
    return int((folder / "run" / f"slurmd.{name}.pid").read_text())


def down(folder: Path) -> None:
    """Cancel all jobs and stop the recorded daemons."""
    folder = folder.resolve()
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    if _alive(folder / "run" / "slurmctld.pid"):
        subprocess.run(["scancel", "--me"], env=environment, check=False, capture_output=True, timeout=20)
        command = ["squeue", "--noheader"]
        for _ in range(100):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=20)
            if not done.stdout.strip():
                break
            time.sleep(0.2)
    for pid in _steps(folder):  # a step that the cancellation did not end would outlive its daemon
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid_file in [*sorted((folder / "run").glob("slurmd.*.pid")), *sorted((folder / "run").glob("*.pid"))]:
        if not _alive(pid_file):
            continue
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            if not _alive(pid_file):
                break
            time.sleep(0.1)
        else:
            os.kill(pid, signal.SIGKILL)
    for group in [FREEZER / f"slurm_{path.name}" for path in (folder / "spool").iterdir()]:
        for path in [*sorted(group.rglob("*/"), reverse=True), group]:
            with contextlib.suppress(OSError):  # a process is still in the group
                path.rmdir()


def _steps(folder: Path) -> list[int]:
    """Return the process ids of the step daemons of this cluster, which inherit its configuration."""
    ours, found = f"SLURM_CONF={folder / 'slurm.conf'}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_step = (process / "comm").read_text().startswith("slurmstepd")
            if is_step and ours in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def _alive(pid_file: Path) -> bool:
    """Return whether the recorded daemon is running. Its name is compared too, because process ids are reused."""
    try:
        pid = pid_file.read_text().strip()
        program = Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return False
    return bool(pid) and program.startswith(pid_file.name.partition(".")[0])


def _run(*command: str, environment: dict[str, str] | None = None) -> None:
    subprocess.run(command, env=environment, check=True, stdin=subprocess.DEVNULL)


def _wait_for(condition: Callable[[], bool], program: str, folder: Path, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-2000:] for path in sorted((folder / "log").glob("*.log")))
            raise TimeoutError(f"{program} is not ready after {timeout_s:.0f} s\n{logs}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    """Return ports that are free now."""
    holders = [socket.socket() for _ in range(count)]
    for holder in holders:
        holder.bind(("127.0.0.1", 0))
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


def _read_ports(conf: Path) -> list[int]:
    """Return the ports of an existing configuration, because its daemons keep listening on them."""
    words = conf.read_text().split() if conf.exists() else []
    return [int(word.partition("=")[2]) for word in words if word.startswith(("SlurmctldPort=", "Port="))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=2, help="CPUs per node, independent of the machine")
    parser.add_argument("--proctrack", choices=["cgroup", "linuxproc"], default="linuxproc", help="ProctrackType")
    options = parser.parse_args()
    if options.action == "up":
        up(options.folder, nodes=options.nodes, cpus=options.cpus, proctrack=options.proctrack)
        print(f"export SLURM_CONF={options.folder.resolve()}/slurm.conf")
    else:
        down(options.folder)


if __name__ == "__main__":
    main()
