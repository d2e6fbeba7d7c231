"""A private SLURM cluster of fake nodes on this machine: no systemd, cgroups, accounts or change to /etc.

Each node is a slurmd in namespaces of its own: with its own host name, its own /etc/hosts (all nodes are
127.0.0.1), and its own processes, so that killing it kills what runs on it, as a machine's failure does.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
# As in a crash: nothing on the node is told, and SLURM learns of it after SlurmdTimeout.
CONFIG = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdTimeout=10
KillWait=10
MinJobAge=3600
MaxArraySize=4
MessageTimeout=10
TCPTimeout=2
JobRequeue=1
MailProg=/bin/true
Licenses=matlab:2
PropagateResourceLimits=NONE
PartitionName=debug Nodes=node[0-{last}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=node[0-{last}] MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no cluster here; empty when there can."""
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
    lacking = [name for name in programs if not shutil.which(name, path=PATH)]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install slurm-wlm munge (scripts/test.sh does, as root)"
    if subprocess.run([*_namespaces(), "true"], capture_output=True).returncode:
        return "this machine allows no namespaces (unshare), which fake nodes live in"
    return ""


class Cluster:
    """Nodes node0, node1, ...; `environment` lets SLURM's commands find them.

    Args:
        folder: short, as sockets' paths are.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._host = os.uname().nodename.partition(".")[0]
        self._port = _free_ports(nodes + 20)
        self._processes: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        for name in ("state", "log", "run", "munge", "dev"):
            (self.folder / name).mkdir(parents=True)
        for folder in (self.folder, self.folder / "munge"):
            folder.chmod(0o711)  # munge wants its socket within reach of all
        self._write_config()
        self._start_munge()
        self._run("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        for node in range(self.nodes):
            self.start_node(node)
        self.wait_for_nodes(self.nodes)

    def stop(self) -> None:
        for name in list(self._processes):
            self._kill(name)

    def start_node(self, node: int) -> None:
        name = f"node{node}"
        enter = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && { "$@" & wait $!; }'
        daemon = ["slurmd", "-D", "-N", name, "-f", self.environment["SLURM_CONF"]]
        hosts = str(self.folder / "hosts")
        self._run(name, *_namespaces(), "bash", "-c", enter, name, hosts, *daemon)

    def crash(self, node: int) -> None:
        """Kills a node with all that runs on it."""
        self._kill(f"node{node}")

    def freeze(self, node: int) -> psutil.Process:
        """Stops a node's daemon: it takes connections and never answers. What runs on the node goes on."""
        below = psutil.Process(self._processes[f"node{node}"].pid).children(recursive=True)
        daemon = next(process for process in below if process.name() == "slurmd")
        daemon.suspend()
        return daemon

    def hide(self, node: int, folder: Path, empty: Path) -> None:
        """On one node there is nothing in `folder` any more, as where a disk is not mounted."""
        self._on(node, "mount", "--bind", str(empty), str(folder))

    def show(self, node: int, folder: Path) -> None:
        """What `hide` has hidden is there again."""
        self._on(node, "umount", str(folder))

    def _on(self, node: int, *argv: str) -> None:
        target = f"--target={self._processes[f'node{node}'].pid}"
        user = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
        subprocess.run(["nsenter", target, *user, "--mount", *argv], check=True, timeout=30)

    def wait_for_nodes(self, count: int, timeout_s: float = 60) -> None:
        """Until so many nodes are idle."""
        end = time.monotonic() + timeout_s
        while (
            self.call("sinfo", "-h", "-p", "debug", "-N", "-o", "%T").split().count("idle") != count
        ):
            assert time.monotonic() < end, self.call("sinfo", "-N", "-l") + self.logs()
            time.sleep(0.1)

    def call(self, *argv: str) -> str:
        return subprocess.run(
            argv, env=self.environment, capture_output=True, text=True, timeout=30, check=False
        ).stdout

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failed test."""
        texts = {f.name: f.read_text(errors="replace")[-1500:] for f in self.folder.glob("log/*")}
        return "".join(f"\n== {name}\n{text}" for name, text in texts.items())

    def _write_config(self) -> None:
        config = CONFIG.format(
            host=self._host,
            port=self._port,
            user=subprocess.check_output(["id", "-un"], text=True).strip(),
            folder=self.folder,
            last=self.nodes - 1,
        )
        gres, hosts = ["AutoDetect=off"], ["127.0.0.1 localhost", f"127.0.0.1 {self._host}"]
        for gpu in range(
            8
        ):  # fake GPUs: SLURM counts the files, and warns that they are no devices
            (self.folder / "dev" / f"gpu{gpu}").touch()
        for i in range(self.nodes):
            name = f"node{i}"
            (self.folder / f"spool.{name}").mkdir()
            config += (
                f"NodeName={name} NodeHostname={self._host} NodeAddr=127.0.0.1 Port={self._port + 10 + i} "
                "CPUs=16 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:8\n"
            )
            gres.append(f"NodeName={name} Name=gpu Count=8 File={self.folder}/dev/gpu[0-7]")
            hosts.append(f"127.0.0.1 {name}")
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "gres.conf").write_text("\n".join(gres) + "\n")
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        self._run("munged", "munged", "--foreground", f"--socket={munge}/socket", *files)
        end = time.monotonic() + 20
        while not (munge / "socket").exists():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.05)

    def _run(self, name: str, *argv: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                argv,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _kill(self, name: str) -> None:
        # unshare --fork ignores SIGTERM, and --kill-child takes all of the node along.
        process = self._processes.pop(name)
        process.send_signal(signal.SIGKILL if name.startswith("node") else signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _namespaces() -> list[str]:
    command = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return (
        command if os.getuid() == 0 else [*command, "--user", "--map-current-user", "--keep-caps"]
    )


def _free_ports(count: int) -> int:
    """The first of so many ports that nobody listens on."""
    for first in range(17000, 30000, 100):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for bound in sockets:
                bound.close()
    raise AssertionError("no free ports")
