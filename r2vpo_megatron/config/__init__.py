"""Configuration of a run: frozen dataclasses."""

from r2vpo_megatron.config.algorithm import AlgorithmConfig
from r2vpo_megatron.config.ring import PipelineConfig, ReplayConfig, RolloutConfig, WeightSyncConfig
from r2vpo_megatron.config.run import RunConfig
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

__all__ = [
    "AlgorithmConfig",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "ParallelConfig",
    "PipelineConfig",
    "ReplayConfig",
    "RolloutConfig",
    "RunConfig",
    "RuntimeConfig",
    "TrainConfig",
    "WeightSyncConfig",
]
