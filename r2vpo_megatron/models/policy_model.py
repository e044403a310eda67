"""The policy: a Megatron GPT model that stops before its LM head."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from r2vpo_megatron.models.attention import PackedSequences
from r2vpo_megatron.models.rotary import inverse_frequencies, rotary_table
from r2vpo_megatron.models.spec import ModelSpec, padded_vocab_size


class PolicyModel(GPTModel):  # type: ignore[misc]
    """One pipeline stage (or virtual stage) of the decoder.

    The last stage returns hidden states, so that log-probs can be formed a few tokens at a time
    without a [tokens, vocab] tensor. Parameters are uninitialised until weights are loaded.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: TransformerConfig,
        block: TransformerBlockSubmodules,
        *,
        device: torch.device,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=block,
            vocab_size=padded_vocab_size(spec.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=spec.max_positions,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=spec.tied_embeddings,
            position_embedding_type="none",  # PackedCoreAttention rotates
            vp_stage=vp_stage,
        )
        self.spec = spec
        # Neither parameter nor buffer: .to(bfloat16) must not round it.
        self._frequencies = inverse_frequencies(spec.head_dim, spec.rope_theta).to(device)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSequences,
    ) -> Tensor:
        """Run this stage's layers.

        Collective: every rank of the tensor and of the context group must call.

        Args:
            input_ids: [1, T] token ids, needed on the first stage (equal across TP); under context
                parallelism T counts this context rank's tokens.
            position_ids: [1, T], restarting at 0 for each sequence; needed on every stage.
            attention_mask: must be None; the signature is Megatron's.
            packed_seq_params: from pack_sequences.

        Returns:
            [T, 1, H]; under sequence parallelism [T / TP, 1, H], this rank's tokens. On the last
            stage after the final norm.

        Raises:
            ValueError: T does not divide by TP under sequence parallelism.
        """
        num_tokens, tensor_size = position_ids.numel(), self.config.tensor_model_parallel_size
        if self.config.sequence_parallel and num_tokens % tensor_size:
            raise ValueError(
                f"{num_tokens} tokens in a micro-batch: with sequence parallelism they must "
                f"divide by the tensor parallel size {tensor_size}; pad the tail"
            )
        cos, sin = rotary_table(position_ids.flatten(), self._frequencies, self.config.params_dtype)
        hidden: Tensor = super().forward(
            input_ids,
            position_ids,
            attention_mask,
            packed_seq_params=packed_seq_params.with_rotary(cos, sin),
        )
        return hidden

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stop where GPTModel.forward would go on to logits and loss."""
        return hidden_states

    def lm_head_weight(self) -> Tensor:
        """This TP rank's rows [padded_vocab / TP, H] of the LM head; last stage only.

        With tied embeddings on one stage it is the embedding's own parameter. Rows from
        `spec.vocab_size` on are padding and must be masked out of the softmax.
        """
        assert self.post_process, "only the last stage has the LM head"
        weight: Tensor = (
            self.shared_embedding_or_output_weight()
            if self.spec.tied_embeddings
            else self.output_layer.weight
        )
        return weight

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """All logits [T, 1, vocab_size] of the last stage's hidden states; for tests.

        Collective: every rank of the tensor group must call.
        """
        logits, _ = self.output_layer(
            hidden, weight=self.lm_head_weight(), runtime_gather_output=True
        )
        trimmed: Tensor = logits[..., : self.spec.vocab_size]
        return trimmed
