"""Why a job waits or has ended, in plain words, and what one can do about it."""

from __future__ import annotations

from launcher.slurm.controller import Job

_WAITING = {
    "Priority": "jobs of higher priority come first",
    "Resources": "the nodes it needs are busy; it is next",
    "BeginTime": "it was queued again and may start in about two minutes",
    "Dependency": "it waits for an earlier job",
    "DependencyNeverSatisfied": "the job it waits for can never satisfy it; cancel it with llm-launch stop",
    "PartitionNodeLimit": "it asks for more nodes than its partition has or allows, and would wait for ever",
    "PartitionTimeLimit": "it asks for more time than its partition allows, and would wait for ever",
    "PartitionDown": "its partition takes no jobs now",
    "PartitionInactive": "its partition takes no jobs now",
    "ReqNodeNotAvail": "nodes it needs are down, drained or reserved",
    "NodeDown": "a node it ran on went down; Slurm has queued it again",
    "AssocGrpGRES": "your account has used up its share of GPUs; it waits for your other jobs",
    "AssocMaxJobsLimit": "your account runs as many jobs as it may",
    "AssocGrpCpuLimit": "your account has used up its share of cores",
    "QOSMaxJobsPerUserLimit": "you run as many jobs as this quality of service allows",
    "QOSMaxGRESPerUser": "you hold as many GPUs as this quality of service allows",
    "QOSMaxNodePerUserLimit": "it asks for more nodes than this quality of service allows you",
    "QOSMaxWallDurationPerJobLimit": "it asks for more time than this quality of service allows",
    "QOSGrpCpuLimit": "this quality of service has no cores left",
    "Reservation": "it waits for its reservation to begin",
    "Licenses": "it waits for a licence",
    "JobHeldUser": "it is held; scontrol release lets it go",
    "JobHeldAdmin": "an administrator holds it",
    "InvalidAccount": "its account does not exist or is not yours; submit again with another --account",
    "InvalidQOS": "its quality of service does not exist or is not yours; submit again with another --qos",
    "launch_failed_requeued_held": "it could not be launched on a node (a prolog failed) and is held; "
    "llm-launch resume lets it go",
    "JobLaunchFailure": "it could not be launched on a node",
    "BadConstraints": "no node has the features it asks for",
}

_ENDED = {
    "COMPLETED": "its job came to its end",
    "CANCELLED": "its job was cancelled",
    "FAILED": "its job failed",
    "TIMEOUT": "its job reached its time limit before it had left",
    "NODE_FAIL": "a node of its job went down",
    "PREEMPTED": "its job had to make way for another",
    "OUT_OF_MEMORY": "its job used more memory than it asked for; ask for more with options in site.toml",
    "BOOT_FAIL": "a node of its job did not boot",
    "DEADLINE": "its job met its deadline",
    "REVOKED": "its job moved to another cluster",
}


def in_words(job: Job) -> str:
    """State and reason of a job, for a person."""
    if job.is_waiting:
        reason = job.reason.partition(",")[0]
        why = _WAITING.get(reason, reason)
        start = (
            f"; expected to start {job.starts_at.replace('T', ' ')}" if job.starts_at and reason in _EXPECTED else ""
        )
        return f"waits in the queue: {why}{start}" if why else f"waits in the queue{start}"
    if job.state == "RUNNING":
        left = f", {job.time_left} of its time left" if job.time_left else ""
        return f"runs on {job.nodes}{left}"
    if job.state == "COMPLETING":
        return "is being cleared away by Slurm"
    return _ENDED.get(job.state, f"its job is {job.state}")


_EXPECTED = ("Priority", "Resources", "BeginTime", "ReqNodeNotAvail")
