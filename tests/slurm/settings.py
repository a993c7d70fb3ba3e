"""What a throw-away Slurm is told: its shape, and the configuration files that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """What a test asks for."""

    nodes: int = 3
    cpus: int = 4
    """Of one node. More than the machine has are allowed."""
    memory: int = 8000
    """Of one node, in MB."""
    gpus: int = 2
    """Of one node. They are clones of /dev/null, which Slurm counts, hands out and names in CUDA_VISIBLE_DEVICES."""
    accounting: bool = False
    """With a database, so that sacct, sacctmgr and QOS answer."""
    extra: str = ""
    """Lines for slurm.conf. They overrule what stands here: `KillWait=30`."""

    @property
    def node_names(self) -> list[str]:
        return [f"node{index}" for index in range(1, self.nodes + 1)]


@dataclass(frozen=True)
class Place:
    """Where one cluster lives on this machine."""

    folder: Path
    host: str
    """Name of this machine, which is the controller's."""
    number: int
    """From 1 to 254, another for each cluster alive: its network and its ports."""

    @property
    def host_address(self) -> str:
        return self.address(254)

    def address(self, last: int) -> str:
        """In 198.18.0.0/15, which is kept for tests of networks, so that nothing here routes it."""
        return f"198.18.{self.number}.{last}"

    @property
    def controller_port(self) -> int:
        return 31000 + 3 * self.number

    @property
    def accounting_port(self) -> int:
        return self.controller_port + 1

    @property
    def database_port(self) -> int:
        return self.controller_port + 2

    @property
    def munge_socket(self) -> Path:
        return self.folder / "munge" / "socket"

    @property
    def database_socket(self) -> Path:
        return self.folder / "run" / "database.sock"


def hosts(shape: Shape, place: Place) -> str:
    """/etc/hosts of the nodes."""
    nodes = [f"{place.address(last)} {name}" for last, name in enumerate(shape.node_names, 1)]
    return _lines("127.0.0.1 localhost", f"{place.host_address} {place.host}", *nodes)


def gres_conf(shape: Shape, place: Place) -> str:
    """The GPUs. Plain files would be counted too, but CUDA_VISIBLE_DEVICES would stay empty."""
    gpus = [f"Name=gpu File={place.folder}/dev/gpu[0-{shape.gpus - 1}]"] if shape.gpus else []
    return _lines("AutoDetect=off", *gpus)


def cgroup_conf(slurm_major: int) -> str:
    """No cgroups. slurmd loads a plugin for them even when nothing uses it, and ends when it finds no mounted tree."""
    return _lines("CgroupPlugin=cgroup/v1" if slurm_major < 23 else "CgroupPlugin=disabled")


def slurm_conf(shape: Shape, place: Place) -> str:
    """The cluster. A key that occurs twice is an error to some versions, so that `extra` replaces."""
    replaced = {line.split("=")[0].strip().lower() for line in shape.extra.splitlines()} - {"partitionname", "nodename"}
    settings = {**_settings(shape, place), **(_accounting(place) if shape.accounting else {})}
    kept = [f"{name}={value}" for name, value in settings.items() if name.lower() not in replaced]
    return _lines(*kept, *_nodes(shape, place), *_PARTITIONS, shape.extra)


def slurmdbd_conf(place: Place) -> str:
    """The accounting daemon. It reads this only from a file of mode 600."""
    return _lines(
        "DbdHost=localhost",
        "DbdAddr=127.0.0.1",
        f"DbdPort={place.accounting_port}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={place.munge_socket}",
        f"LogFile={place.folder}/log/slurmdbd.log",
        f"PidFile={place.folder}/run/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=127.0.0.1",
        f"StoragePort={place.database_port}",
        "StorageUser=slurm",
        "StoragePass=slurm",
        "StorageLoc=slurm",
    )


_PARTITIONS = (
    "PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF",
    "PartitionName=spot Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=10",
    "PartitionName=short Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=2",
)
"""`main` takes the nodes of `spot`, whose jobs are requeued; `short` ends every job after 2 minutes."""


def _settings(shape: Shape, place: Place) -> dict[str, object]:
    folder = place.folder
    files = {
        "StateSaveLocation": folder / "controller",
        "SlurmdSpoolDir": folder / "spool" / "%n",
        "SlurmctldPidFile": folder / "run" / "slurmctld.pid",
        "SlurmdPidFile": folder / "run" / "slurmd.%n.pid",
        "SlurmctldLogFile": folder / "log" / "slurmctld.log",
        "SlurmdLogFile": folder / "log" / "slurmd.%n.log",
        "JobCompType": "jobcomp/filetxt",
        "JobCompLoc": folder / "completed_jobs.txt",
        "MailProg": "/bin/true",
    }
    identity = {
        "ClusterName": "local",
        "SlurmctldHost": f"{place.host}({place.host_address})",
        "SlurmctldPort": place.controller_port,
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={place.munge_socket}",
        "AccountingStorageType": "accounting_storage/none",
    }
    a_test_machine_has_no_cgroups_and_few_cores = {
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/linux",
        "MpiDefault": "none",
        "SlurmdParameters": "config_overrides",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "DefMemPerCPU": shape.memory // shape.cpus,
        "GresTypes": "gpu",
    }
    quicker_than_real_sites = {
        "SlurmdTimeout": 15,
        "SlurmctldTimeout": 15,
        "KillWait": 5,
        "MinJobAge": 3600,
        "ReturnToService": 2,
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=100000,bf_interval=2",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
    }
    return {**identity, **files, **a_test_machine_has_no_cgroups_and_few_cores, **quicker_than_real_sites}


def _accounting(place: Place) -> dict[str, object]:
    return {
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": "127.0.0.1",
        "AccountingStoragePort": place.accounting_port,
        "AccountingStoragePass": place.munge_socket,  # the clients of slurmdbd do not read AuthInfo
        "AccountingStorageTRES": "gres/gpu",
        "PriorityType": "priority/multifactor",
    }


def _nodes(shape: Shape, place: Place) -> list[str]:
    gpus = f" Gres=gpu:{shape.gpus}" if shape.gpus else ""
    size = f"CPUs={shape.cpus} RealMemory={shape.memory}{gpus}"
    return [
        f"NodeName={name} NodeHostname={name} NodeAddr={place.address(last)} Port=6818 {size}"
        for last, name in enumerate(shape.node_names, 1)
    ]


def _lines(*lines: str) -> str:
    return "\n".join(lines).rstrip() + "\n"
