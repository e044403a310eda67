"""Logits, gradient norm and one optimizer step of the Megatron model equal transformers'.

The step is Adam's first with learning rate 1, epsilon 1 and no decay: w - g / (|g| + 1), so that
it shows every gradient g, after data-parallel reduction, token normalisation, the summing of tied
copies and the distributed optimizer's parameter gather.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.hf_bridge import iterate_hf_weights, load_hf_weights
from r2vpo_megatron.device import get_platform
from r2vpo_megatron.models.spec import read_model_spec
from r2vpo_megatron.parallel.context import context_positions, sum_over_context
from r2vpo_megatron.parallel.state import ParallelState, destroy_parallel, initialize_parallel
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_checkpoints import (
    BATCHES,
    VARIANTS,
    Batch,
    reference_gradients,
    reference_logits,
    save_checkpoint,
)


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    virtual_pipeline: int | None = None
    pipeline_layout: str = ""
    recompute: str = "none"
    num_layers: int = 4

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tensor=2),
    "pp2": Layout(pipeline=2),
    "tp2_pp2": Layout(tensor=2, pipeline=2),
    "tp2_sp": Layout(tensor=2, sequence_parallel=True, recompute="full"),
    "tp2_pp2_sp": Layout(tensor=2, pipeline=2, sequence_parallel=True, recompute="core_attn"),
    "pp2_vpp2": Layout(pipeline=2, virtual_pipeline=2, recompute="mlp"),
    "tp2_dp2": Layout(tensor=2, data=2),
    "cp2": Layout(context=2),
    "cp4_recompute": Layout(context=4, recompute="core_attn"),
    "tp2_cp2_sp": Layout(tensor=2, context=2, sequence_parallel=True, recompute="full"),
    "pp2_cp2_dp2": Layout(pipeline=2, context=2, data=2),
    "pp2_vpp2_cp2": Layout(pipeline=2, virtual_pipeline=2, context=2),
    "pp2_uneven": Layout(pipeline=2, pipeline_layout="3,1", recompute="full"),
    "pp3_uneven": Layout(pipeline=3, pipeline_layout="2,1,1"),
    "tp2_pp2_sp_uneven": Layout(
        tensor=2, pipeline=2, pipeline_layout="1,3", sequence_parallel=True
    ),
    "pp2_vpp2_uneven": Layout(
        pipeline=2, virtual_pipeline=2, pipeline_layout="1,3,2,1", num_layers=7
    ),
    "pp3_bare_ends": Layout(pipeline=3, pipeline_layout="0,4,0", recompute="full"),
    "tp2_pp2_vpp2_sp_bare_ends": Layout(
        tensor=2,
        pipeline=2,
        virtual_pipeline=2,
        pipeline_layout="0,3,1,0",
        sequence_parallel=True,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What one layout, or transformers, made of one checkpoint."""

    logits: list[Tensor]  # [T, vocab] for each of BATCHES, from ranks of the last stage
    grad_norm: float
    stepped: dict[str, Tensor]  # weights after the step by Hugging Face name, from rank 0


@dataclass(frozen=True)
class Reference:
    """A checkpoint, and what transformers made of it."""

    folder: Path
    outcome: Outcome


def _forward_step(batches: Any, model: Any, *, state: ParallelState) -> tuple[Tensor, Any]:
    from r2vpo_megatron.models.attention import pack_sequences

    batch: Batch = next(batches)
    context_rank, context_size = state.context_rank, state.context_size
    num_tokens = len(batch.token_ids)
    held = torch.from_numpy(context_positions(num_tokens, context_rank, context_size))
    hidden = model(
        batch.token_ids[held].unsqueeze(0),
        batch.position_ids[held].unsqueeze(0),
        None,
        packed_seq_params=pack_sequences(
            batch.cumulative_lengths,
            torch.device("cpu"),
            context_rank=context_rank,
            context_size=context_size,
        ),
    )

    def loss(hidden: Tensor, non_loss_data: bool = False) -> Any:
        unwrapped = model.module if hasattr(model, "module") else model
        logits = unwrapped.compute_logits(hidden)[:, 0]
        if non_loss_data:
            everyone = logits.new_zeros(num_tokens, logits.shape[1])
            everyone[held] = logits
            return sum_over_context(everyone, state.context_group)
        targets = batch.target_ids[held]
        total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return total, torch.tensor(len(held), dtype=torch.int), {}

    return hidden, loss


def _run_schedule(
    chunks: list[Any], batches: list[Batch], state: ParallelState, **kwargs: Any
) -> list[Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    iterators = [iter(batches) for _ in chunks]
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=functools.partial(_forward_step, state=state),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=1,
        micro_batch_size=1,
        **kwargs,
    )
    return results


def _run_checkpoint(layout: Layout, state: ParallelState, folder: Path) -> Outcome:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from r2vpo_megatron.models.build import build_model

    platform = get_platform("cpu")
    spec = read_model_spec(folder)
    chunks = build_model(
        spec,
        state,
        platform,
        sequence_parallel=layout.sequence_parallel,
        recompute=layout.recompute,
    )
    load_hf_weights(chunks, spec, state, folder)
    batches = list(BATCHES)
    logits = _run_schedule(chunks, batches, state, forward_only=True, collect_non_loss_data=True)

    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True
    )
    wrapped = [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=1.0,
        adam_eps=1.0,
        weight_decay=0.0,
        clip_grad=1e9,  # 0 would leave the norm out
        use_distributed_optimizer=True,
    )
    with platform.optimizer_context():
        optimizer = get_megatron_optimizer(optimizer_config, wrapped)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    local_batches = batches[state.data_rank :: state.data_size]
    _run_schedule(wrapped, local_batches, state, forward_only=False)
    with platform.optimizer_context():
        _, grad_norm, _ = optimizer.step()
    stepped = {
        name: tensor.detach().clone()
        for name, tensor in iterate_hf_weights(wrapped, spec, state)
        if tensor is not None
    }
    return Outcome(logits, float(grad_norm), stepped)


def _run_layout(
    rank: int, world_size: int, init_method: str, layout: Layout, folders: dict[str, Path]
) -> dict[str, Outcome]:
    state = initialize_parallel(
        get_platform("cpu"),
        rank=rank,
        world_size=world_size,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        context=layout.context,
        virtual_pipeline=layout.virtual_pipeline,
        pipeline_layout=layout.pipeline_layout,
        init_method=init_method,
        timeout_seconds=60,
    )
    outcomes = {name: _run_checkpoint(layout, state, folder) for name, folder in folders.items()}
    destroy_parallel()
    return outcomes


@pytest.fixture(scope="module")
def references(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int], dict[str, Reference]]:
    """Number of layers -> every checkpoint of so many."""

    @functools.cache
    def make(num_layers: int) -> dict[str, Reference]:
        return {
            variant: _make_reference(variant, tmp_path_factory.mktemp(variant), num_layers)
            for variant in VARIANTS
        }

    return make


def _make_reference(variant: str, folder: Path, num_layers: int) -> Reference:
    model = save_checkpoint(variant, folder, num_layers=num_layers)
    with torch.no_grad():
        logits = [reference_logits(model, batch) for batch in BATCHES]
    gradients = reference_gradients(model)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    stepped = {
        name: parameter.detach() - gradients[name] / (gradients[name].abs() + 1.0)
        for name, parameter in model.named_parameters()
    }
    return Reference(folder, Outcome(logits, float(norm), stepped))


@pytest.fixture(scope="module", params=LAYOUTS)
def outcomes(
    request: pytest.FixtureRequest, references: Callable[[int], dict[str, Reference]]
) -> dict[str, tuple[Outcome, Outcome]]:
    """All checkpoints on one layout, logits from the last rank, weights from rank 0; and what
    transformers made of them."""
    layout = LAYOUTS[request.param]
    expected = references(layout.num_layers)
    folders = {variant: reference.folder for variant, reference in expected.items()}
    by_rank = run_ranks(layout.world_size, _run_layout, layout, folders)
    return {
        variant: (
            Outcome(
                by_rank[-1][variant].logits,
                by_rank[0][variant].grad_norm,
                by_rank[0][variant].stepped,
            ),
            reference.outcome,
        )
        for variant, reference in expected.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(
    outcomes: dict[str, tuple[Outcome, Outcome]], variant: str
) -> None:
    outcome, reference = outcomes[variant]
    for logits, expected in zip(outcome.logits, reference.logits, strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_step_equals_transformers(
    outcomes: dict[str, tuple[Outcome, Outcome]], variant: str
) -> None:
    outcome, reference = outcomes[variant]
    assert list(outcome.stepped) == list(reference.stepped)
    for name, weight in outcome.stepped.items():
        expected = reference.stepped[name]
        torch.testing.assert_close(
            weight, expected, atol=1e-6, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_norm_counts_every_shard_once(
    outcomes: dict[str, tuple[Outcome, Outcome]], variant: str
) -> None:
    outcome, reference = outcomes[variant]
    assert outcome.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
