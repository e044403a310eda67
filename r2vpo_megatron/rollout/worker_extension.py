"""Methods that this project adds to vLLM's workers, beside vLLM's own for weight transfer.

vLLM mixes the class into its own worker class (`worker_extension_cls`), one instance per
tensor-parallel rank, and `LLM.collective_rpc` calls its methods by name on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r2vpo_megatron.rollout.weight_transfer_engine import WorkerReport


class WeightPushExtension:
    """What a weight push needs of a worker and vLLM lacks. Names differ from the worker's own."""

    # Provided by vLLM's worker.
    vllm_config: Any
    weight_transfer_engine: Any
    _weight_update_active: bool
    finish_weight_update: Callable[[], None]

    def abandon_weight_push(self) -> None:
        """Leave a half-received push, if there is one; vLLM can only finish it."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            if self.weight_transfer_engine.worker_reloads and self._weight_update_active:
                self.finish_weight_update()  # a layer left half-loaded would count towards the next
            else:
                self.weight_transfer_engine.abandon()
        self._weight_update_active = False

    def take_weight_push_report(self) -> WorkerReport:
        """Stage times, and whether the connection broke, since the last call."""
        report: WorkerReport = self.weight_transfer_engine.take_report()
        return report
