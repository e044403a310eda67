"""Methods that this project adds to vLLM's workers to replace their weights in place.

vLLM mixes the class into its own worker class (`worker_extension_cls`), one instance per
tensor-parallel rank, and `LLM.collective_rpc` calls its methods by name on all ranks.

A worker's weights are in the kernels' format (packed and partly emptied on a CPU), so a plain
`load_weights` into them is wrong or fails. `vllm.model_executor.model_loader.reload` restores the
checkpoint format layer by layer; it must be initialised once per push and finalised once.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from r2vpo_megatron.rollout.engine import WeightBucket


class WeightPushExtension:
    """Receives a weight push in a vLLM worker. Its names must differ from the worker's own."""

    # Provided by vLLM's worker.
    model_runner: Any
    vllm_config: Any

    @torch.no_grad()
    def begin_weight_push(self) -> None:
        """Put the model's layers into checkpoint format, ready for all buckets of one push."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        # A layer left half-loaded would count that half towards the next push.
        self.abort_weight_push()
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())
        self._weight_push_open = True

    @torch.no_grad()
    def load_weight_push_bucket(self, bucket: WeightBucket) -> dict[str, float]:
        """Attach to a bucket, verify it and load its tensors; returns stage times in seconds."""
        from vllm.config import set_current_vllm_config

        start = time.perf_counter()
        tensors = bucket.open()
        opened = time.perf_counter()
        # A layer whose tensors lie in two buckets keeps its first tensors until the second bucket
        # comes (reload/layerwise.py, online_process_loader); they keep their bucket mapped.
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(tensors.items())
        return {
            "weight_sync/open_seconds": opened - start,
            "weight_sync/load_seconds": time.perf_counter() - opened,
        }

    @torch.no_grad()
    def finish_weight_push(self) -> None:
        """Bring what has not been processed yet into the kernels' format."""
        self._finalize()
        self._weight_push_open = False

    @torch.no_grad()
    def abort_weight_push(self) -> None:
        """Leave a half-received push; the weights are then unusable until the next full push."""
        if getattr(self, "_weight_push_open", False):
            self._finalize()
            self._weight_push_open = False

    def _finalize(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
        from vllm.platforms import current_platform

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            if not current_platform.is_cpu():
                return
            # On a CPU the LM head's matrix product uses a packed copy of its weight. With tied
            # embeddings no tensor is loaded into the head itself, so that the reload above leaves
            # the copy stale, without an error.
            for module in model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)
