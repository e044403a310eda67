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
from r2vpo_megatron.config.survival import CheckpointConfig, GuardConfig
from r2vpo_megatron.config.variants import side_by_side, variants

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "GuardConfig",
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
    "side_by_side",
    "variants",
]
