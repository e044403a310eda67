"""Configuration of a run: frozen dataclasses."""

from r2vpo_megatron.config.algorithm import AlgorithmConfig
from r2vpo_megatron.config.run import RunConfig
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
)

__all__ = [
    "AlgorithmConfig",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "ParallelConfig",
    "ReplayConfig",
    "RolloutConfig",
    "RunConfig",
    "RuntimeConfig",
    "TrainConfig",
    "WeightSyncConfig",
]
