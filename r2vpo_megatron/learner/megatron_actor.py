"""One rank of the learner: log-probs, policy updates and weight export on Megatron-core.

Plain torch.distributed: it knows nothing of Ray or of rollouts. Every public method is a
collective over all learner ranks, to be called on each with that rank's own batches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from r2vpo_megatron.checkpoint.hf_bridge import HfWeights, iterate_hf_weights, load_hf_weights
from r2vpo_megatron.checkpoint.safetensors_io import save_hf_checkpoint
from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.data.packing import dummy_batch
from r2vpo_megatron.device.base import Platform
from r2vpo_megatron.learner.forward_step import ForwardStep, PolicyHead, logprob_step, policy_step
from r2vpo_megatron.learner.head_checks import HeadChecks
from r2vpo_megatron.learner.micro_batch import MicroBatch
from r2vpo_megatron.learner.non_finite import NonFiniteUpdate, samples_at_fault
from r2vpo_megatron.learner.optimizer import make_trainable
from r2vpo_megatron.learner.run_state import LearnerState
from r2vpo_megatron.models.build import build_model
from r2vpo_megatron.models.spec import read_model_spec
from r2vpo_megatron.parallel.collectives import reduce_statistics
from r2vpo_megatron.parallel.context import sum_over_context
from r2vpo_megatron.parallel.state import ParallelState
from r2vpo_megatron.records import FloatArray, PackedBatch
from r2vpo_megatron.rl.loss import LossSettings
from r2vpo_megatron.rl.objectives import OBJECTIVES


class MegatronActor:
    """The policy on one rank, built from a Hugging Face checkpoint at any TP x PP."""

    def __init__(
        self, config: RunConfig, model_dir: Path, state: ParallelState, platform: Platform
    ) -> None:
        """Load this rank's shards and set up gradients and optimizer. Collective."""
        dtype = getattr(torch, config.model.dtype)
        self._config = config
        self._state = state
        self._model_dir = model_dir
        self._spec = read_model_spec(model_dir)
        models = build_model(
            self._spec,
            state,
            platform,
            sequence_parallel=config.parallel.sequence_parallel,
            recompute=config.parallel.recompute,
            dtype=dtype,
        )
        load_hf_weights(models, self._spec, state, config.model.weights or model_dir)
        self._model = make_trainable(models, config.optimizer, dtype, state, platform)
        self._head = PolicyHead(
            state=state,
            vocab_size=self._spec.vocab_size,
            temperature=config.rollout.temperature,
            sequence_parallel=config.parallel.sequence_parallel,
        )
        self._saved_state = LearnerState(self._model, state, platform)
        self._num_updates = 0

    def compute_logprobs(
        self, batches: Sequence[PackedBatch], temperature: float | None = None
    ) -> dict[str, FloatArray]:
        """log pi of the current weights for the response tokens of `batches`.

        Collective: every rank must call, with equally many batches.

        Args:
            batches: this data parallel rank's micro-batches, the same on all ranks of its
                model replica.
            temperature: that logits are divided by; None for that of sampling.

        Returns:
            sample id -> [R] fp32, on tensor and context rank 0 of the last stage; empty on other
            ranks.
        """
        head = self._head if temperature is None else replace(self._head, temperature=temperature)
        with torch.no_grad():
            kept = self._run_schedule(logprob_step(head), batches, forward_only=True)
        if self._state.tensor_rank != 0 or self._state.context_rank != 0:
            return {}
        return {
            sample_id: logprobs.cpu().numpy()
            for by_sample in kept
            for sample_id, logprobs in by_sample.items()
        }

    def update(
        self, batches: Sequence[PackedBatch], ratio_penalty: float, policy_version: int
    ) -> dict[str, float]:
        """One optimizer step on the global batch that all data parallel ranks' batches make.

        Collective: every rank must call, with equally many batches.

        Args:
            batches: this data parallel rank's micro-batches.
            ratio_penalty: lambda of this update.
            policy_version: of the weights that the engines got last; the statistics by staleness
                count from it.

        Returns:
            Mean weighted objective, ratio statistics, also by staleness, and gradient norm of the
            global batch, the same on every rank.

        Raises:
            NonFiniteUpdate: on every rank alike, before any weight is changed, where log-probs,
                loss or gradient are not finite.
            RuntimeError: likewise, where a check of the LM head fails (`HeadChecks`).
        """
        algorithm = self._config.algorithm
        checks = self._head_checks()
        settings = LossSettings(
            objective=OBJECTIVES[algorithm.objective],
            aggregation=algorithm.aggregation,
            ratio_penalty=ratio_penalty,
            policy_version=policy_version,
            importance_cap=algorithm.truncated_importance_cap,
            entropy_coefficient=algorithm.entropy_coefficient,
        )
        step = policy_step(self._head, settings, checks)
        self._model.zero_gradients()
        kept = self._run_schedule(step, batches, forward_only=False)
        statistics = reduce_statistics(kept, self._state)
        if not statistics.is_finite:
            names = samples_at_fault(kept, self._state)
            if not names:  # a sum alone, that of entropies for one
                names = samples_at_fault(kept, self._state, all_of_them=True)
            raise NonFiniteUpdate("log-probs, advantages or loss are not finite", names)
        head_metrics = checks.settle(getattr(torch, self._config.model.dtype))
        lr = self._learning_rate()
        try:
            gradient_norm = self._model.step(lr)
        except FloatingPointError as error:
            names = samples_at_fault(kept, self._state, all_of_them=True)
            raise NonFiniteUpdate(str(error), names) from error
        self._num_updates += 1
        return {
            **statistics.metrics(),
            "objective/mean": statistics.objective / max(statistics.denominator, 1.0),
            "optimizer/gradient_norm": gradient_norm,
            "optimizer/lr": lr,
            **head_metrics,
        }

    def hf_weights(self) -> HfWeights:
        """Stream of (HF name, whole tensor on rank 0, None elsewhere).

        Collective: every rank must iterate to the end.
        """
        return iterate_hf_weights(self._model.chunks, self._spec, self._state)

    def save_hf(self, output_dir: Path) -> None:
        """Write the current weights as a Hugging Face checkpoint. Collective; rank 0 writes."""
        weights = self.hf_weights()
        try:
            if self._state.is_writer:
                save_hf_checkpoint(weights, output_dir, self._model_dir)
        finally:
            exhaust(weights)  # the other ranks go through all of it, whatever the disk does

    def begin_save_state(self, folder: Path) -> None:
        """Copy all that is trained, and begin to write it; see LearnerState.begin_save."""
        self._saved_state.begin_save(folder, {"num_updates": self._num_updates})

    def is_state_saved(self) -> bool:
        """Whether this rank has written what `begin_save_state` copied. No collective."""
        return self._saved_state.is_saved()

    def finish_save_state(self) -> None:
        """Wait until all ranks have written; see LearnerState.finish_save."""
        self._saved_state.finish_save()

    def load_state(self, folder: Path) -> None:
        """Continue where `begin_save_state` was called, by whatever layout."""
        self._num_updates = self._saved_state.load(folder)["num_updates"]

    def _head_checks(self) -> HeadChecks:
        every = self._config.runtime.head_check_every_updates
        return HeadChecks(
            self._state.device, compare_plain=every > 0 and self._num_updates % every == 0
        )

    def _learning_rate(self) -> float:
        """Linear warm-up from 0, then constant."""
        warmup = self._config.optimizer.warmup_updates
        return self._config.optimizer.lr * min(1.0, (self._num_updates + 1) / max(warmup, 1))

    def _run_schedule(
        self, step: ForwardStep, batches: Sequence[PackedBatch], *, forward_only: bool
    ) -> list[Any]:
        """Run Megatron's pipeline schedule; what the last stage kept, one entry per batch.

        An interleaved schedule goes in rounds of one micro-batch a stage, so some without samples
        may be added at the end.
        """
        if len(self._model.chunks) > 1:
            missing = -len(batches) % self._state.pipeline_size
            batches = [*batches, *[dummy_batch(self._config.parallel.tokens_multiple)] * missing]
        iterators = [(self._micro_batch(batch) for batch in batches) for _ in self._model.chunks]
        kept: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._model.chunks if len(iterators) > 1 else self._model.chunks[0],
            num_microbatches=len(batches),
            seq_length=1,  # unused: lengths vary and travel with the activations
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return kept

    def _micro_batch(self, batch: PackedBatch) -> MicroBatch:
        """This rank's share of a micro-batch."""
        state = self._state
        if state.context_size == 1:
            return MicroBatch.of(batch, state.device)
        return MicroBatch.of(
            batch,
            state.device,
            context_rank=state.context_rank,
            context_size=state.context_size,
            sum_over_context=functools.partial(sum_over_context, group=state.context_group),
        )


def exhaust(stream: Iterable[Any]) -> None:
    """Take part in a collective stream whose items this rank does not need."""
    for _ in stream:
        pass
