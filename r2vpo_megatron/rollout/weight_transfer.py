"""vLLM plugin that makes this project's weight pushes known to it as the back end "r2vpo".

Installed packages announce `register_weight_transfer` as an entry point of the group
vllm.general_plugins, which vLLM calls in each of its processes; `VLLMEngine` also calls it, for a
source tree that is not installed.
"""

from __future__ import annotations

from r2vpo_megatron.observability.stacks import write_stacks_when_asked

BACKEND_NAME = "r2vpo"


def register_weight_transfer() -> None:
    """Register the weight transfer engine. May be called any number of times."""
    write_stacks_when_asked()  # the first code of this project that an engine's processes run
    # vLLM reads the environment while it is imported, so not with this module.
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    # The factory refuses a second registration and offers no way to ask but this.
    if BACKEND_NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND_NAME,
            "r2vpo_megatron.rollout.weight_transfer_engine",
            "BucketWeightTransferEngine",
        )
