"""How a vLLM worker loads weight buckets: this project's weight transfer engine for vLLM.

vLLM's worker owns one instance and drives it: start_weight_update, update_weights once per bucket,
finish_weight_update. A worker's weights are in the kernels' format (packed and partly emptied on a
CPU), so a plain `load_weights` into them is wrong or fails; vLLM's layerwise reload restores the
checkpoint format layer by layer, once per push.

vLLM 0.23 constructs engines as (config, parallel_config, model), runs the layerwise reload itself
and hands `load_weights` over; 0.32 constructs them as (config, vllm_config, device, model) and
leaves both to the engine. Either is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from r2vpo_megatron.rollout.weight_updates import WeightBucket, WeightTransferInterrupted


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """Which connection to join, and the member that the engine's first worker is."""

    connection: Any
    first_rank: int


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """The next bucket of the push."""

    bucket: WeightBucket


@dataclass
class WorkerReport:
    """What a worker has to tell since it was last asked.

    A broken connection is reported, not raised: it is no fault of this worker, and vLLM carries
    exceptions between processes as text alone.
    """

    seconds: dict[str, float] = field(default_factory=dict)  # of receive, verify, load
    interruption: str | None = None


class BucketWeightTransferEngine(WeightTransferEngine):
    """Receives buckets in one vLLM worker."""

    init_info_cls = JoinInfo
    update_info_cls = BucketInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, *arguments: Any) -> None:
        """Take what this vLLM passes; the model comes last in every version."""
        super().__init__(config, *arguments)
        # Of vLLM 0.23, on which the pinned vllm-ascend stands: not the engine, but the worker puts
        # layers into checkpoint format and back.
        self.worker_reloads = len(arguments) == 2
        self.model: Any = arguments[-1]
        self._link: Any = None
        self._is_reloading = False
        self._report = WorkerReport()

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Join the sender's connection, leaving that of before."""
        self.shutdown()
        try:
            self._link = init_info.connection.join(init_info.first_rank + self.parallel_config.rank)
        except WeightTransferInterrupted as error:
            self._report.interruption = str(error)

    @torch.no_grad()
    def start_weight_update(self) -> None:
        """Put the model's layers into checkpoint format, ready for all buckets of one push."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.abandon()
        initialize_layerwise_reload(self.model)
        self._is_reloading = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one bucket and load it; vLLM's own would ask a CPU for its accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    @torch.no_grad()
    def receive_weights(
        self, update_info: BucketInfo, load_weights: Callable[[Any], Any] | None = None
    ) -> None:
        """Verify a bucket and load its tensors.

        Args:
            update_info: the bucket.
            load_weights: given by vLLM versions that run the layerwise reload themselves.
        """
        try:
            tensors = update_info.bucket.open(self._link, self._report.seconds)
        except WeightTransferInterrupted as error:
            self._report.interruption = str(error)
            return
        start = time.perf_counter()
        # A layer whose tensors lie in two buckets keeps its first tensors until the second bucket
        # comes (reload/layerwise.py, online_process_loader); they keep their bucket alive.
        (load_weights or self.model.load_weights)(tensors.items())
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._report.seconds["load"] = time.perf_counter() - start

    @torch.no_grad()
    def finish_weight_update(self) -> None:
        """Bring what has not been processed yet into the kernels' format."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
        from vllm.platforms import current_platform

        finalize_layerwise_reload(self.model, self.model_config)
        self._is_reloading = False
        if not current_platform.is_cpu():
            return
        # On a CPU the LM head's matrix product uses a packed copy of its weight. With tied
        # embeddings no tensor is loaded into the head itself, so that the reload above leaves
        # the copy stale, without an error.
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def abandon(self) -> None:
        """Leave a half-received push; the weights are then unusable until the next full push.

        A layer left half-loaded would count that half towards the next push.
        """
        if self._is_reloading:
            self.finish_weight_update()

    def take_report(self) -> WorkerReport:
        """What there is to tell, once."""
        report, self._report = self._report, WorkerReport()
        return report

    def shutdown(self) -> None:
        """Leave the sender's connection."""
        link, self._link = self._link, None
        if link is not None:
            link.close()
