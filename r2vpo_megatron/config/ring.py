"""The sections of a run's configuration on what goes round the ring: rollout, replay, weights."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from r2vpo_megatron.config.checks import require, require_choice, require_positive


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled for training."""

    num_engines: int = 1
    """Number of vLLM engines, data parallel."""
    tensor_parallel: int = 1
    """Tensor parallel size of each engine."""
    temperature: float = 1.0
    """Sampling temperature; the learner's log-probs use the same one."""
    top_p: float = 1.0
    """Must stay 1: below it the log-probs are not those of the sampling distribution."""
    top_k: int = 0
    """Must stay 0 (off), for the same reason."""
    max_prompt_tokens: int = 2048
    """Longest prompt, in tokens; longer ones are left out, never cut."""
    max_response_tokens: int = 16384
    """Longest response, in tokens; a response cut there counts as truncated."""
    max_num_seqs: int = 256
    """Sequences that one engine decodes at a time."""
    kv_cache_bytes: int = 4 << 30
    """Memory for one engine's KV cache, in bytes (cpu; elsewhere memory_fraction decides)."""
    memory_fraction: float = 0.85
    """Share of a device's memory that an engine takes (cuda, npu), weights included."""
    threads_per_engine: int = 1
    """CPU threads of one engine (cpu only)."""
    slice_seconds: float = 0.2
    """Time that an engine samples between two reports to the driver, in seconds."""
    hang_seconds: float = 120.0
    """An engine that has not reported for so long counts as hung and is restarted, in seconds."""
    max_restarts: int = 3
    """Restarts of engines in one run, after which the next loss of one ends it."""

    def __post_init__(self) -> None:
        require_positive(
            "rollout",
            self,
            "num_engines",
            "tensor_parallel",
            "max_prompt_tokens",
            "max_response_tokens",
            "max_num_seqs",
            "kv_cache_bytes",
            "threads_per_engine",
        )
        slice_seconds, hang_seconds = self.slice_seconds, self.hang_seconds
        require(slice_seconds > 0, "rollout.slice_seconds", slice_seconds, "above 0")
        is_longer = hang_seconds > 4 * slice_seconds
        reason = f"above 4 x rollout.slice_seconds = {4 * slice_seconds:g}"
        require(is_longer, "rollout.hang_seconds", hang_seconds, reason)
        require(self.max_restarts >= 0, "rollout.max_restarts", self.max_restarts, "at least 0")
        # The range in which vLLM samples at exactly the temperature that it was given.
        in_range = 0.01 <= self.temperature <= 2
        require(in_range, "rollout.temperature", self.temperature, "0.01 to 2")
        in_range = 0 < self.memory_fraction < 1
        require(in_range, "rollout.memory_fraction", self.memory_fraction, "between 0 and 1")
        reason = "the log-probs would not be those of the sampling distribution"
        require(self.top_p == 1.0, "rollout.top_p", self.top_p, f"1.0 in training; {reason}")
        require(self.top_k == 0, "rollout.top_k", self.top_k, f"0 (off) in training; {reason}")


@dataclass(frozen=True)
class ReplayConfig:
    """The FIFO buffer of past iterations. Algorithm 1 is capacity 1 with an UTD of 1."""

    capacity_iterations: int = 4
    """Iterations whose responses are kept; 1 discards them after one use."""
    update_to_data: float | str = 2.0
    """UTD: samples trained on per sample generated, as a number or a ratio: 2, 1.5 or 3/2."""
    with_replacement: bool = False
    """Draw samples independently; else none twice before all have been drawn as often."""
    max_memory_bytes: int = 0
    """Memory of the samples, in bytes, beyond which the oldest iterations go early; 0: no limit."""

    def __post_init__(self) -> None:
        require_positive("replay", self, "capacity_iterations")
        value, valid = self.update_to_data, "a number or a ratio above 0, such as 1.5 or '3/2'"
        try:
            is_positive = self.update_to_data_ratio > 0
        except (ValueError, ZeroDivisionError):
            is_positive = False
        require(is_positive, "replay.update_to_data", value, valid)
        limit = self.max_memory_bytes
        require(limit >= 0, "replay.max_memory_bytes", limit, "at least 0")

    @property
    def update_to_data_ratio(self) -> Fraction:
        """`update_to_data`, exactly as it is written: 0.1 is 1/10."""
        return Fraction(str(self.update_to_data))


@dataclass(frozen=True)
class PipelineConfig:
    """How rollout and learner take turns, or do not."""

    mode: str = "synchronous"
    """synchronous: rollout, update, push in turn; asynchronous: rollout of the next iterations
    goes on during the updates."""
    max_staleness: int = 1
    """How old a sample may be when it is first learned, in versions behind the learner's
    (asynchronous, or with carry_over_fraction)."""
    in_flight: str = "keep"
    """What a push does with responses under way: keep (they go on with the new weights), abort
    (they are handed out again from where they were) or drain (they are waited for)."""
    carry_over_fraction: float = 0.0
    """Groups started beyond an iteration's number, as a share of it: the slowest are carried over
    to the next. 0: an iteration is its own prompts, in their order."""

    def __post_init__(self) -> None:
        require_choice("pipeline.mode", self.mode, ("synchronous", "asynchronous"))
        require_positive("pipeline", self, "max_staleness")
        require_choice("pipeline.in_flight", self.in_flight, ("keep", "abort", "drain"))
        require(
            0 <= self.carry_over_fraction <= 1,
            "pipeline.carry_over_fraction",
            self.carry_over_fraction,
            "0 (off) to 1",
        )


@dataclass(frozen=True)
class WeightSyncConfig:
    """How updated weights reach the engines."""

    backend: str = "shared_memory"
    """Transport by name (r2vpo_megatron.weight_sync.BACKENDS); auto: nccl or hccl on devices,
    shared memory on the CPUs of one machine, gloo on those of several."""
    bucket_bytes: int = 256 << 20
    """Size of a bucket, in bytes; two are alive at a time. A larger tensor gets one of its own."""

    def __post_init__(self) -> None:
        require_positive("weight_sync", self, "bucket_bytes")
