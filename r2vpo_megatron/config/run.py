"""RunConfig: all sections of one run, and the checks that span them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

from r2vpo_megatron.config.algorithm import AlgorithmConfig
from r2vpo_megatron.config.checks import require
from r2vpo_megatron.config.ring import PipelineConfig, ReplayConfig, RolloutConfig, WeightSyncConfig
from r2vpo_megatron.config.sections import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ParallelConfig,
    RuntimeConfig,
    TrainConfig,
)
from r2vpo_megatron.config.survival import CheckpointConfig, GuardConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run is decided by; a recipe is a function that returns one."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def samples_per_iteration(self) -> int:
        """Responses generated in one iteration."""
        return self.train.prompts_per_iteration * self.train.responses_per_prompt

    @property
    def updates_per_iteration(self) -> Fraction:
        """Optimizer steps after each iteration's rollout, on average over many."""
        samples = self.replay.update_to_data_ratio * self.samples_per_iteration
        return samples / self.train.mini_batch_samples

    def updates_in_iteration(self, iteration: int) -> int:
        """Optimizer steps after this iteration's rollout: what keeps the UTD, in whole updates.

        Args:
            iteration: 1, 2, ...
        """
        before, now = (
            math.floor(number * self.updates_per_iteration) for number in (iteration - 1, iteration)
        )
        return now - before

    @property
    def mixes_versions(self) -> bool:
        """Whether responses may come in after the weights that began them were replaced."""
        return self.pipeline.mode == "asynchronous" or self.pipeline.carry_over_fraction > 0

    @property
    def iterations_ahead(self) -> int:
        """Iterations whose rollout may run while the current one is waited for and learned.

        A carried-over group ages by one iteration more, which its staleness bound must allow.
        """
        if self.pipeline.mode == "synchronous":
            return 0
        return self.pipeline.max_staleness - (self.pipeline.carry_over_fraction > 0)

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt and response together."""
        return self.rollout.max_prompt_tokens + self.rollout.max_response_tokens

    def validate(self) -> None:
        """Check what spans sections.

        Raises:
            ValueError: naming the field, its value and what is valid.
        """
        num_iterations, batch = self.train.num_iterations, self.train.mini_batch_samples
        require(
            num_iterations * self.updates_per_iteration >= 1,
            "train.mini_batch_samples",
            batch,
            f"at most {math.floor(num_iterations * self.updates_per_iteration * batch)}, the "
            "samples that replay.update_to_data gives all of train.num_iterations, for one update",
        )
        capacity = self.replay.capacity_iterations * self.samples_per_iteration
        require(
            self.replay.with_replacement or batch <= capacity,
            "train.mini_batch_samples",
            batch,
            f"at most the {capacity} samples of the full buffer when sampling without replacement",
        )
        require(
            self.replay.with_replacement
            or self.replay.update_to_data_ratio <= self.replay.capacity_iterations,
            "replay.update_to_data",
            self.replay.update_to_data,
            f"at most replay.capacity_iterations ({self.replay.capacity_iterations}) when "
            "sampling without replacement",
        )
        require(
            self.parallel.max_tokens_per_micro_batch >= self.max_sequence_tokens,
            "parallel.max_tokens_per_micro_batch",
            self.parallel.max_tokens_per_micro_batch,
            f"at least rollout.max_prompt_tokens + rollout.max_response_tokens "
            f"= {self.max_sequence_tokens}",
        )
        require(
            self.algorithm.overlong_buffer_tokens <= self.rollout.max_response_tokens,
            "algorithm.overlong_buffer_tokens",
            self.algorithm.overlong_buffer_tokens,
            f"at most rollout.max_response_tokens = {self.rollout.max_response_tokens}",
        )
        require(
            not self.mixes_versions or self.algorithm.behavior_logprobs == "rollout",
            "algorithm.behavior_logprobs",
            self.algorithm.behavior_logprobs,
            "'rollout' with pipeline.mode 'asynchronous' or pipeline.carry_over_fraction: when a "
            "response comes in, the learner has left the weights that sampled it",
        )
        require(
            self.pipeline.mode == "synchronous" or self.iterations_ahead >= 1,
            "pipeline.max_staleness",
            self.pipeline.max_staleness,
            "at least 2 in asynchronous mode with pipeline.carry_over_fraction",
        )
        require(
            bool(self.model.path) != bool(self.model.testbed),
            "model.path",
            self.model.path,
            "a checkpoint folder, or empty with model.testbed set (exactly one of the two)",
        )
        require(
            bool(self.data.train_prompts) or bool(self.model.testbed),
            "data.train_prompts",
            self.data.train_prompts,
            "a prompt file (.jsonl or .parquet), unless model.testbed brings its own",
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as written to `config.json` of the run."""
        return asdict(self)
