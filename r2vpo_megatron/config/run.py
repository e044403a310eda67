"""RunConfig: all sections of one run, and the checks that span them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from r2vpo_megatron.config.algorithm import AlgorithmConfig
from r2vpo_megatron.config.sections import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ParallelConfig,
    ReplayConfig,
    RolloutConfig,
    RuntimeConfig,
    TrainConfig,
    WeightSyncConfig,
    require,
)


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
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def samples_per_iteration(self) -> int:
        """Responses generated in one iteration."""
        return self.train.prompts_per_iteration * self.train.responses_per_prompt

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer steps after each iteration's rollout."""
        return round(
            self.replay.update_to_data * self.samples_per_iteration / self.train.mini_batch_samples
        )

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt and response together."""
        return self.rollout.max_prompt_tokens + self.rollout.max_response_tokens

    def validate(self) -> None:
        """Check what spans sections.

        Raises:
            ValueError: naming the field, its value and what is valid.
        """
        samples, batch = self.samples_per_iteration, self.train.mini_batch_samples
        require(
            (self.replay.update_to_data * samples) % batch == 0,
            "train.mini_batch_samples",
            batch,
            f"a divisor of replay.update_to_data x samples per iteration "
            f"= {self.replay.update_to_data * samples:g}",
        )
        require(
            self.replay.with_replacement
            or self.replay.update_to_data <= self.replay.capacity_iterations,
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
