"""What the looks at all nodes say, node by node and against each other."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from packaging.requirements import Requirement

from r2vpo_megatron.diagnosis.findings import Finding, fault, ok, warning
from r2vpo_megatron.diagnosis.node import NodeReport
from r2vpo_megatron.diagnosis.packages import compare_versions

SLOW_WRITE = 100e6  # bytes per second
ENOUGH_OPEN_FILES = 65_536  # Ray opens several for each worker and each node
CLOCK_SECONDS = 1.0
GIB = 1 << 30
MOST_NAMED = 5


def judge_devices(nodes: Sequence[NodeReport]) -> list[Finding]:
    """Whether all nodes have devices, and the same ones."""
    findings = [
        fault("devices", f"{node.name}: {node.device_error}", "mend that node, or leave it out")
        for node in nodes
        if node.devices is None
    ]
    seen: dict[str, list[str]] = {}
    for node in nodes:
        if (devices := node.devices) is not None:
            versions = "".join(f", {name} {value}" for name, value in devices.versions.items())
            kinds = " and ".join(dict.fromkeys(devices.names))
            text = f"{len(devices.names)} x {kinds}, {devices.memory_bytes / GIB:.0f} GiB{versions}"
            seen.setdefault(text, []).append(node.name)
    if len(seen) > 1:
        each = "; ".join(f"{named(names)}: {text}" for text, names in seen.items())
        findings.append(warning("devices", each, "use nodes of one kind, with one driver"))
    else:
        findings += [ok("devices", f"{named(names)}: {text}") for text, names in seen.items()]
    return findings


def judge_packages(
    nodes: Sequence[NodeReport], pins: Sequence[Requirement], pin_file: str
) -> list[Finding]:
    """Whether all nodes have the same versions, and those that were pinned together.

    Args:
        nodes: that were looked at.
        pins: of the platform.
        pin_file: that has them, for the text.
    """
    first = nodes[0]
    others = [
        node.name
        for node in nodes
        if (node.packages, node.python) != (first.packages, first.python)
    ]
    if others:
        return [
            fault(
                "packages",
                f"{named(others)} and {first.name} have different versions",
                "install one environment on all nodes, best on a folder that they share",
            )
        ]
    if differing := compare_versions(pins, first.packages):
        return [
            warning(
                "packages",
                f"not as in {pin_file}: {'; '.join(differing)}",
                f"pip install -r {shlex.quote(pin_file)}, or run the self-test with what is there",
            )
        ]
    return [ok("packages", f"the {len(pins)} that matter are as in {pin_file}")]


def judge_folders(nodes: Sequence[NodeReport], needed_bytes: int) -> list[Finding]:
    """Whether every node can write to a run's folders, sees the same ones, and fast enough.

    Args:
        nodes: that were looked at.
        needed_bytes: room for the checkpoints that are kept, and one that is being written.
    """
    findings = []
    for number, folder in enumerate(nodes[0].folders):
        subject = f"folder {folder.path}"
        of_nodes = [(node.name, node.folders[number]) for node in nodes]
        errors = [f"{name}: {seen.error}" for name, seen in of_nodes if seen.error]
        apart = [name for name, seen in of_nodes if not seen.error and not seen.names]
        if errors:
            findings.append(
                fault(subject, "; ".join(errors), "make it writable on every node (output.dir)")
            )
        elif apart:
            findings.append(
                fault(
                    subject,
                    f"{named(apart)} do not see what the driver wrote there",
                    "name a folder of a file system that all nodes share (output.dir)",
                )
            )
        else:
            rate = min(seen.write_bytes_per_second for _, seen in of_nodes)
            free = min(seen.free_bytes for _, seen in of_nodes)
            findings.append(_judge_room(subject, rate, free, needed_bytes))
    return findings


def _judge_room(subject: str, rate: float, free: int, needed: int) -> Finding:
    text = f"{free / GIB:.0f} GiB free, {rate / 1e6:.0f} MB/s from a node to the disk"
    if free < needed:
        return fault(
            subject,
            f"{text}; checkpoints take up to {needed / GIB:.1f} GiB",
            "make room, or keep fewer (checkpoint.keep_last, checkpoint.keep_every_iterations)",
        )
    if rate < SLOW_WRITE:
        return warning(
            subject,
            f"{text}; checkpoints of {needed / GIB:.1f} GiB in all are slow there",
            "name a faster file system (output.dir), or write fewer (checkpoint.every_iterations)",
        )
    return ok(subject, f"{text}; checkpoints take up to {needed / GIB:.1f} GiB")


def judge_model_files(nodes: Sequence[NodeReport], model_dir: str) -> list[Finding]:
    """Whether every node reads the same model."""
    first = nodes[0]
    others = [node.name for node in nodes if node.model_files != first.model_files]
    if not first.model_files or others:
        return [
            fault(
                "model",
                f"{model_dir} is not the same on {named(others or [first.name])}",
                "put it on a file system that all nodes share (model.path)",
            )
        ]
    return [ok("model", f"{len(first.model_files)} files of {model_dir} on every node")]


def judge_limits(nodes: Sequence[NodeReport], shared_memory_bytes: int) -> list[Finding]:
    """Whether nodes let a run open its files and map its buffers.

    Args:
        nodes: that were looked at.
        shared_memory_bytes: that a node needs in /dev/shm.
    """
    findings = []
    few = {node.name: node.open_files for node in nodes if 0 <= node.open_files < ENOUGH_OPEN_FILES}
    if few:
        text = f"{named(list(few))}: a process may have {min(few.values()):,}"
        remedy = f"ulimit -n {ENOUGH_OPEN_FILES}, before Ray is started"
        findings.append(warning("open files", text, remedy))
    small = [node.name for node in nodes if node.shared_memory_bytes < shared_memory_bytes]
    if small:
        findings.append(
            fault(
                "/dev/shm",
                f"{named(small)}: under {shared_memory_bytes / GIB:.2f} GiB free",
                "make it larger (docker run --shm-size), or make weight_sync.bucket_bytes and "
                "runtime.object_store_bytes smaller",
            )
        )
    if not findings:
        least = min(node.shared_memory_bytes for node in nodes) / GIB
        findings.append(ok("limits", f"open files, and {least:.1f} GiB of /dev/shm, are enough"))
    return findings


def judge_clocks(skews: Mapping[str, float]) -> Finding:
    """Whether the nodes' clocks agree.

    Args:
        skews: seconds by which a node's clock is at least off the driver's.
    """
    off = {name: skew for name, skew in skews.items() if abs(skew) > CLOCK_SECONDS}
    if off:
        text = ", ".join(f"{name} {skew:+.1f} s" for name, skew in off.items())
        return warning(
            "clocks", text, "let chronyd or ntpd set them: logs and file times cannot be compared"
        )
    return ok("clocks", f"within {CLOCK_SECONDS:g} s of each other")


def named(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
