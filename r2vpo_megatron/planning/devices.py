"""The devices that a plan knows: what the vendors publish, and how much of it is reached.

Efficiencies are assumptions, not measurements; every one of them can be overridden on the command
line. A device named "cpu" is calibrated on the machine itself (benchmarks/plan_time.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from r2vpo_megatron.config.checks import require, require_choice

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")


@dataclass(frozen=True)
class Device:
    """One accelerator, or a CPU that stands for one.

    Attributes:
        name: as the command line takes it.
        memory_bytes: of the device.
        peak_flops: dense matrix products of the training dtype, per second.
        memory_bandwidth: bytes read or written per second.
        node_bandwidth: bytes per second that a device sends to others of its node.
        network_bandwidth: bytes per second that a device sends to other nodes.
        matmul_efficiency: share of `peak_flops` that large products reach.
        attention_efficiency: likewise in the attention kernel.
        bandwidth_efficiency: share of `memory_bandwidth` that reading weights and element-wise work
            reach.
        cache_efficiency: share of it that reading keys and values reaches.
        link_efficiency: share of both link bandwidths that collectives reach.
        collective_seconds: of one collective, however small.
        step_seconds: of one decoding step besides its arithmetic: scheduler, launches.
        sampler_passes: passes over fp32 logits that drawing a token takes.
        reserved_bytes: of the device's context, kernels and communicators.
        usable_share: of the memory; the rest is left for the holes of an allocator.
        is_cpu: computes as `device/cpu.py` does: other kernels, other buffers; host memory is the
            device's; products of a few rows do not hide the reading of weights.
        fuses_adamw: AdamW needs no temporary tensors.
    """

    name: str
    memory_bytes: int
    peak_flops: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    matmul_efficiency: float = 0.6
    attention_efficiency: float = 0.4
    bandwidth_efficiency: float = 0.7
    cache_efficiency: float = 0.7
    link_efficiency: float = 0.7
    collective_seconds: float = 2e-5
    step_seconds: float = 5e-3
    sampler_passes: float = 12.0
    reserved_bytes: int = 3 << 30
    usable_share: float = 0.95
    is_cpu: bool = False
    fuses_adamw: bool = True

    @property
    def usable_bytes(self) -> int:
        """Memory that a plan of the learner may fill."""
        return int(self.memory_bytes * self.usable_share)

    @property
    def matmul_rate(self) -> float:
        """Operations per second of large products."""
        return self.peak_flops * self.matmul_efficiency

    @property
    def attention_rate(self) -> float:
        """Operations per second of the attention kernel."""
        return self.peak_flops * self.attention_efficiency

    @property
    def stream_rate(self) -> float:
        """Bytes per second of work that memory bounds."""
        return self.memory_bandwidth * self.bandwidth_efficiency

    def link_rate(self, *, within_node: bool) -> float:
        """Bytes per second that a device sends in a collective."""
        bandwidth = self.node_bandwidth if within_node else self.network_bandwidth
        return bandwidth * self.link_efficiency


DEVICES = {
    device.name: device
    for device in (
        # Atlas 800T A2: eight cards, HCCS full mesh, one 200 Gb/s RoCE port a card. Kernels are
        # started one by one (enforce_eager), hence the longer step.
        Device(
            name="ascend-910b-64gb",
            memory_bytes=64 * 10**9,
            peak_flops=313e12,
            memory_bandwidth=1.6e12,
            node_bandwidth=196e9,
            network_bandwidth=25e9,
            matmul_efficiency=0.5,
            step_seconds=15e-3,
            fuses_adamw=False,
        ),
        # SXM, NVLink 4, one 400 Gb/s port a GPU.
        Device(
            name="h100-80gb",
            memory_bytes=80 * 10**9,
            peak_flops=989e12,
            memory_bandwidth=3.35e12,
            node_bandwidth=450e9,
            network_bandwidth=50e9,
            matmul_efficiency=0.5,
        ),
        # SXM, NVLink 3, one 200 Gb/s port a GPU.
        Device(
            name="a100-80gb",
            memory_bytes=80 * 10**9,
            peak_flops=312e12,
            memory_bandwidth=2.0e12,
            node_bandwidth=300e9,
            network_bandwidth=25e9,
        ),
        # One core of a server; benchmarks/plan_time.py measures the one that it runs on.
        Device(
            name="cpu",
            memory_bytes=8 * 10**9,
            peak_flops=1e11,
            memory_bandwidth=1e10,
            node_bandwidth=1e9,
            network_bandwidth=1e9,
            matmul_efficiency=1.0,
            attention_efficiency=0.5,
            bandwidth_efficiency=1.0,
            link_efficiency=1.0,
            collective_seconds=2e-4,
            step_seconds=5e-3,
            reserved_bytes=600 << 20,
            is_cpu=True,
        ),
    )
}


def find_device(name: str) -> Device:
    """A device of the table.

    Raises:
        ValueError: unknown name.
    """
    require_choice("--device", name, tuple(DEVICES))
    return DEVICES[name]


def parse_bytes(text: str, field: str) -> int:
    """Read a size such as 64GB (10^9) or 80GiB (2^30).

    Args:
        text: what the user gave.
        field: for the error.

    Raises:
        ValueError: no number with a unit, or 0.
    """
    match = _SIZE.fullmatch(text)
    valid = "a number above 0 with a unit: GB (10^9 bytes), GiB (2^30), MB, MiB, ..., as in 64GB"
    require(match is not None and match[2].upper() in _UNITS, field, text, valid)
    assert match is not None
    size = round(float(match[1]) * _UNITS[match[2].upper()])
    require(size > 0, field, text, valid)
    return size
