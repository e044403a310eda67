"""The learner on forked ranks, as a cluster runs it: what tests of it give it and get back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from r2vpo_megatron.checkpoint.hf_bridge import iterate_hf_weights
from r2vpo_megatron.config import (
    AlgorithmConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
)
from r2vpo_megatron.data.packing import pack_trajectories
from r2vpo_megatron.device import Platform, get_platform
from r2vpo_megatron.models.spec import read_model_spec
from r2vpo_megatron.parallel.state import ParallelState, initialize_parallel
from r2vpo_megatron.records import PackedBatch, Trajectory
from r2vpo_megatron.rl.dual import DUAL_CONTROLLERS, DualSettings
from tests.distributed.reference_update import POLICY_VERSION, Learned
from tests.distributed.tiny_checkpoints import VOCAB_SIZE

RATIO_PENALTY = 0.3


@dataclass(frozen=True)
class Case:
    """What is trained and how, whatever the layout."""

    objective: str = "r2vpo"
    aggregation: str = "token_mean"
    importance_cap: float = 0.0
    entropy_coefficient: float = 0.0

    @property
    def name(self) -> str:
        """For the names of tests."""
        capped = "-importance" if self.importance_cap else ""
        entropy = "-entropy" if self.entropy_coefficient else ""
        return f"{self.objective}-{self.aggregation}{capped}{entropy}"


def run_config(
    parallel: ParallelConfig,
    case: Case = Case(),
    *,
    token_budget: int = 48,
    distributed: bool = True,
    dtype: str = "float32",
) -> RunConfig:
    """Settings under which every part of an update counts.

    The gradient is clipped, the learning rate warms up, weights decay. Adam's eps is about the
    root mean square of a clipped gradient's elements: a step is then neither plain gradient
    descent nor the sign of an element that may be smaller than fp32's rounding of its sum.
    """
    return RunConfig(
        model=ModelConfig(path="unused", dtype=dtype),
        rollout=RolloutConfig(temperature=0.8),
        algorithm=AlgorithmConfig(
            objective=case.objective,
            aggregation=case.aggregation,
            truncated_importance_cap=case.importance_cap,
            entropy_coefficient=case.entropy_coefficient,
            ratio_penalty=RATIO_PENALTY,
            dual_target=0.15,
        ),
        optimizer=OptimizerConfig(
            lr=1e-3,
            eps=2e-4,
            warmup_updates=2,
            weight_decay=0.1,
            max_gradient_norm=0.05,
            distributed=distributed,
        ),
        parallel=replace(parallel, max_tokens_per_micro_batch=token_budget),
    )


def make_trajectories(
    lengths: Sequence[tuple[int, int]], seed: int, advantages: Sequence[float] = ()
) -> list[Trajectory]:
    """Random tokens with behaviour log-probs around those of a random model.

    Several versions have sampled each response, one after the other.

    Args:
        lengths: (prompt, response) tokens of each.
        seed: of the tokens and of what else is drawn.
        advantages: one each; drawn where empty.
    """
    random = np.random.default_rng(seed)
    version_random = np.random.default_rng([seed, 1])
    advantages = advantages or random.normal(size=len(lengths)).tolist()
    return [
        Trajectory(
            sample_id=f"sample-{seed}-{index}",
            group_id="group",
            prompt_token_ids=tuple(random.integers(0, VOCAB_SIZE, prompt).tolist()),
            response_token_ids=tuple(random.integers(0, VOCAB_SIZE, response).tolist()),
            behavior_logprobs=random.normal(-5.0, 0.5, response).astype(np.float32),
            rollout_logprobs=np.zeros(response, dtype=np.float32),
            reward=0.0,
            advantage=advantage,
            finish_reason="stop",
            policy_versions=np.sort(version_random.integers(0, POLICY_VERSION + 1, response)),
            iteration=1,
        )
        for index, ((prompt, response), advantage) in enumerate(
            zip(lengths, advantages, strict=True)
        )
    ]


def start_state(
    rank: int,
    world_size: int,
    init_method: str,
    parallel: ParallelConfig,
    platform: Platform | None = None,
) -> ParallelState:
    """Join the process group as LearnerWorker does; by default on the CPU."""
    return initialize_parallel(
        platform or get_platform("cpu"),
        rank=rank,
        world_size=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        virtual_pipeline=parallel.interleaved_chunks,
        pipeline_layout=parallel.pipeline_layout,
        init_method=init_method,
        timeout_seconds=60.0,
    )


def make_actor(
    config: RunConfig, model_dir: Path, state: ParallelState, platform: Platform | None = None
) -> Any:
    """This rank's learner; by default on the CPU."""
    from r2vpo_megatron.learner.megatron_actor import MegatronActor

    return MegatronActor(config, model_dir, state, platform or get_platform("cpu"))


def start_actor(
    rank: int, world_size: int, init_method: str, config: RunConfig, model_dir: Path
) -> tuple[Any, ParallelState]:
    """Join the process group and build this rank's learner."""
    state = start_state(rank, world_size, init_method, config.parallel)
    return make_actor(config, model_dir, state), state


def rank_batches(
    trajectories: Sequence[Trajectory], parallel: ParallelConfig, state: ParallelState
) -> list[PackedBatch]:
    """This rank's micro-batches, as LearnerGroup deals them."""
    return pack_trajectories(
        trajectories,
        max_tokens_per_micro_batch=parallel.max_tokens_per_micro_batch,
        num_data_parallel_ranks=parallel.data,
        pad_to_multiple_of=parallel.tokens_multiple,
    )[state.data_rank]


def copied_weights(actor: Any) -> dict[str, Tensor]:
    """The whole model by Hugging Face name on rank 0, empty elsewhere. Collective."""
    return {name: tensor.clone() for name, tensor in actor.hf_weights() if tensor is not None}


def learn(
    config: RunConfig,
    model_dir: Path,
    state: ParallelState,
    mini_batches: Sequence[Sequence[Trajectory]],
    platform: Platform | None = None,
) -> Learned:
    """One update for each mini-batch, lambda moved as the loop moves it. Collective.

    Returns:
        Gradients and weights on rank 0 alone, metrics and lambdas on every rank.
    """
    algorithm = config.algorithm
    settings = DualSettings(
        target=algorithm.dual_target,
        step_size=algorithm.dual_step_size,
        gain=algorithm.dual_gain,
        minimum=algorithm.ratio_penalty_min,
        maximum=algorithm.ratio_penalty_max,
    )
    actor = make_actor(config, model_dir, state, platform)
    penalty = algorithm.ratio_penalty
    metrics, penalties = [], [penalty]
    with recorded_gradients(model_dir, state) as gradients:
        for mini_batch in mini_batches:
            batches = rank_batches(mini_batch, config.parallel, state)
            metrics.append(actor.update(batches, penalty, POLICY_VERSION))
            second_moment = metrics[-1]["ratio/second_moment"]
            penalty = DUAL_CONTROLLERS["multiplicative"](penalty, second_moment, settings)
            penalties.append(penalty)
    return Learned(metrics, gradients, penalties, copied_weights(actor))


@contextmanager
def recorded_gradients(model_dir: Path, state: ParallelState) -> Iterator[list[dict[str, Tensor]]]:
    """Fill the list, before each optimizer step, with the whole reduced gradient on rank 0."""
    from r2vpo_megatron.learner.optimizer import TrainableModel

    recorded: list[dict[str, Tensor]] = []
    spec = read_model_spec(model_dir)
    step = TrainableModel.step

    def recording_step(model: Any, lr: float) -> float:
        for chunk in model.chunks:
            _gather_gradients(chunk)
        views = [_GradientView(chunk) for chunk in model.chunks]
        gradients = iterate_hf_weights(views, spec, state)
        recorded.append({name: g.clone() for name, g in gradients if g is not None})
        return step(model, lr)

    with mock.patch.object(TrainableModel, "step", recording_step):
        yield recorded


def _gather_gradients(chunk: Any) -> None:
    """Give every data parallel rank all of the gradient: the distributed optimizer's reduction
    leaves each with the shard that it owns."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in chunk.buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shards = bucket.grad_data.chunk(dist.get_world_size(group))
            gathered = [torch.empty_like(shard) for shard in shards]
            dist.all_gather(gathered, shards[dist.get_rank(group)].clone(), group=group)
            bucket.grad_data.copy_(torch.cat(gathered))


class _GradientView:
    """A model chunk whose parameters are its main gradients, for iterate_hf_weights."""

    def __init__(self, chunk: Any) -> None:
        self._model = chunk.module
        self.decoder = chunk.module.decoder

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters():
            yield name, parameter.main_grad
