"""All that is looked at before a run, in the order in which one thing needs another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.diagnosis.cluster import ClusterReport, examine_cluster, time_all_reduce
from r2vpo_megatron.diagnosis.findings import Finding, fault, warning
from r2vpo_megatron.diagnosis.inputs import check_inputs, checkpoint_bytes
from r2vpo_megatron.diagnosis.judgement import (
    judge_clocks,
    judge_devices,
    judge_folders,
    judge_limits,
    judge_model_files,
    judge_packages,
)
from r2vpo_megatron.diagnosis.packages import PIN_FILES, REQUIREMENTS, read_pins
from r2vpo_megatron.orchestration.cluster import ray_session
from r2vpo_megatron.orchestration.inputs import RunInputs
from r2vpo_megatron.orchestration.placement import needed_resources


def diagnose(config: RunConfig) -> Iterator[Finding]:
    """Look at what a run by this configuration needs; findings as they come.

    A Ray is joined (`runtime.ray_address`), or started on this machine and ended again. The folder
    that runs are written to is made if missing; nothing is left in it.
    """
    inputs, findings = check_inputs(config)
    yield from findings
    if inputs is None:
        return
    config = inputs.config
    try:
        with ray_session(config, needed_resources(config)):
            folders = [Path(config.output.dir).resolve()]
            report = examine_cluster(config, inputs.model_dir, folders)
            yield from report.findings
            if report.nodes:
                yield from _judge(report, inputs)
                yield time_all_reduce(config)
    except (RuntimeError, ConnectionError) as error:
        remedy = "see what Ray says, and what the nodes were started with"
        yield fault("Ray", str(error).splitlines()[0], remedy)


def _judge(report: ClusterReport, inputs: RunInputs) -> Iterator[Finding]:
    config, nodes = inputs.config, report.nodes
    yield from judge_devices(nodes)
    pin_file = REQUIREMENTS / PIN_FILES[config.runtime.device]
    if pin_file.is_file():
        yield from judge_packages(nodes, read_pins(pin_file), str(pin_file))
    else:
        yield warning("packages", f"{pin_file} is not there", "install from a checkout")
    yield from judge_model_files(nodes, str(inputs.model_dir))
    yield from judge_folders(nodes, checkpoint_bytes(config, inputs.spec))
    yield from judge_limits(nodes, 2 * config.weight_sync.bucket_bytes)
    yield judge_clocks(report.skews)
