"""Build the policy on Megatron-core's local layer spec, the same way on every platform."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from r2vpo_megatron.device.base import Platform
from r2vpo_megatron.models.attention import PackedCoreAttention
from r2vpo_megatron.models.norm import RMSNorm
from r2vpo_megatron.models.pipeline import layers_of_chunks
from r2vpo_megatron.models.policy_model import PolicyModel
from r2vpo_megatron.models.spec import ModelSpec, validate_layout
from r2vpo_megatron.parallel.state import ParallelState

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}


class BiasedRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """A row-parallel projection that always has its bias.

    Megatron ties the bias of linear_proj to add_bias_linear, which would also add biases to the
    MLP; openPangu has the one without the other.
    """

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


def transformer_config(
    spec: ModelSpec,
    state: ParallelState,
    platform: Platform,
    *,
    sequence_parallel: bool = False,
    recompute: str = "none",
    dtype: torch.dtype = torch.float32,
) -> TransformerConfig:
    """Megatron's configuration of this model on this grid of ranks.

    Args:
        spec: the model.
        state: sizes of the grid, the virtual pipeline included.
        platform: what the hardware dictates overrides the rest.
        sequence_parallel: split activations outside attention and MLP over tokens; no effect
            on one tensor-parallel rank.
        recompute: activations to form again in the backward pass: "none", "full" (whole layers),
            "core_attn" or "mlp".
        dtype: of parameters and activations.

    Raises:
        ValueError: unknown recompute, or a layout that does not fit the model.
    """
    if recompute not in _RECOMPUTE:
        raise ValueError(f"recompute = {recompute!r}: must be one of {', '.join(_RECOMPUTE)}")
    validate_layout(
        spec,
        state.tensor_size,
        state.pipeline_size,
        state.virtual_pipeline_size,
        state.pipeline_layout,
    )
    fields = _decoder_fields(spec, dtype) | _grid_fields(state)
    if state.pipeline_layout:
        fields["pipeline_model_parallel_layout"] = _megatron_layout(_chunks(spec, state))
    fields["sequence_parallel"] = sequence_parallel and state.tensor_size > 1
    fields |= _RECOMPUTE[recompute] | platform.transformer_config_overrides()
    return TransformerConfig(**fields)


def _decoder_fields(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_query_groups": spec.num_kv_heads,
        "kv_channels": spec.head_dim,
        "ffn_hidden_size": spec.ffn_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "use_te_activation_func": True,  # the layer spec's, which is the platform's, not TE's
        "add_bias_linear": False,
        "add_qkv_bias": spec.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "perform_initialization": False,  # every parameter comes from a checkpoint
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        # Losses are sums over tokens; finalize_model_grads divides by the global token count.
        "calculate_per_token_loss": True,
    }


def _grid_fields(state: ParallelState) -> dict[str, Any]:
    interleaved = state.virtual_pipeline_size is not None
    return {
        "tensor_model_parallel_size": state.tensor_size,
        "pipeline_model_parallel_size": state.pipeline_size,
        "virtual_pipeline_model_parallel_size": state.virtual_pipeline_size,
        "context_parallel_size": state.context_size,
        # Micro-batches differ in length, so stages exchange shapes; Megatron then insists on
        # this dispatcher even without experts.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # Without overlapped transfers interleaving at two stages gives wrong gradients.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _chunks(spec: ModelSpec, state: ParallelState) -> list[list[int]]:
    """The layers of every chunk of the model, see models/pipeline.py."""
    return layers_of_chunks(
        spec.num_layers, state.pipeline_size, state.virtual_pipeline_size, state.pipeline_layout
    )


def _megatron_layout(chunks: list[list[int]]) -> str:
    """Megatron's notation: E the embedding, t a layer, L the LM head, | between chunks."""
    return f"E{'|'.join('t' * len(layers) for layers in chunks)}L"


def layer_spec(
    spec: ModelSpec, state: ParallelState, platform: Platform, norm: ModuleSpec
) -> ModuleSpec:
    """One decoder layer: Megatron's own classes, but for norm, core attention and o_proj."""
    core_attention = functools.partial(
        PackedCoreAttention,
        platform=platform,
        context_group=state.context_group,
    )
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core_attention,
            linear_proj=BiasedRowParallelLinear if spec.o_bias else RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=ColumnParallelLinear,
            linear_fc2=RowParallelLinear,
            # Megatron takes a plain function as it is, and would build anything else.
            activation_func=lambda gate_up: platform.swiglu(gate_up),
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            # The Transformer Engine keys, as in Megatron's own local spec, so that a checkpoint
            # is the same with and without it.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def build_model(
    spec: ModelSpec,
    state: ParallelState,
    platform: Platform,
    *,
    sequence_parallel: bool = False,
    recompute: str = "none",
    dtype: torch.dtype = torch.float32,
) -> list[PolicyModel]:
    """This rank's part of the model: one chunk, or one for each virtual pipeline stage.

    Collective: every rank must call (tied embeddings on two stages are synchronised). The
    parameters hold garbage until weights are loaded.

    Args:
        spec: the model.
        state: where this rank stands.
        platform: the hardware.
        sequence_parallel: see transformer_config.
        recompute: see transformer_config.
        dtype: of parameters and activations.

    Raises:
        ValueError: as transformer_config.
    """
    config = transformer_config(
        spec,
        state,
        platform,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
        dtype=dtype,
    )
    held = _chunks(spec, state)[state.pipeline_rank :: state.pipeline_size]
    norm = ModuleSpec(
        module=RMSNorm, params={"device": state.device, "rms_norm": platform.rms_norm}
    )
    layer = layer_spec(spec, state, platform, norm)
    chunks = [
        PolicyModel(
            spec,
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * len(layers), layer_norm=norm),
            device=state.device,
            pre_process=state.is_first_stage and chunk == 0,
            post_process=state.is_last_stage and chunk == len(held) - 1,
            vp_stage=chunk if state.virtual_pipeline_size is not None else None,
        )
        for chunk, layers in enumerate(held)
    ]
    for model, layers in zip(chunks, held, strict=True):
        assert [built.layer_number - 1 for built in model.decoder.layers] == layers
        _mark_tensor_parallel_parameters(model)
    return chunks


def _mark_tensor_parallel_parameters(model: PolicyModel) -> None:
    """Set the attributes by which Megatron's gradient norm tells shards from replicas.

    megatron/core/tensor_parallel/layers.py sets them on weights while it initialises them,
    which is switched off here. Unmarked, every TP rank's shard but the first would silently be
    left out of the norm.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is None or hasattr(weight, "tensor_model_parallel"):
            continue
        if isinstance(module, VocabParallelEmbedding | ColumnParallelLinear):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=1, stride=1)
    for parameter in model.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
