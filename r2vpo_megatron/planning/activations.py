"""Bytes that a micro-batch needs on a learner rank, tensor by tensor as the modules make them.

What autograd keeps of a layer (models/norm.py, attention.py, swiglu.py, Megatron's linear layers):

    norms       the residual stream before each, their outputs (the inputs of qkv and fc1)
    attention   qkv as the product made it, rotated q and k, the kernel's output and its
                log-sum-exp; under context parallelism the gathered keys and values in qkv's place
    MLP         gate and up, and their SwiGLU

Recomputation drops the attention's part, the MLP's, or all but the layer's input.
"""

from __future__ import annotations

from dataclasses import dataclass

from r2vpo_megatron.config import ParallelConfig
from r2vpo_megatron.learner.head_checks import PLAIN_TOKENS
from r2vpo_megatron.models.spec import ModelSpec, padded_vocab_size
from r2vpo_megatron.parallel.vocab_logprobs import CHUNK_BYTES, GRADIENT_BLOCK_COLUMNS
from r2vpo_megatron.parallel.vocab_softmax import ACCELERATOR_BLOCK_BYTES, CPU_BLOCK_BYTES
from r2vpo_megatron.planning.pack_load import PackLoad

_FP32 = 4
# Of a token: ids and positions, int64. Of a response token: its place, target, sequence and
# version, int64; five fp32 numbers; what the loss makes of them on the way to its statistics.
_TOKEN_BYTES, _RESPONSE_TOKEN_BYTES = 16, 140


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one decoder layer for one micro-batch.

    Attributes:
        stream: the residual stream once.
        norms: what both norms keep, their outputs included.
        attention: what core attention keeps without recomputation.
        attention_inputs: what stays of it with recompute core_attn.
        mlp: what the MLP keeps.
        mlp_backward: most that its backward pass needs beside what is kept.
        attention_backward: likewise of core attention.
    """

    stream: int
    norms: int
    attention: int
    attention_inputs: int
    mlp: int
    mlp_backward: int
    attention_backward: int

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        parallel: ParallelConfig,
        load: PackLoad,
        itemsize: int,
        *,
        is_cpu: bool,
    ) -> LayerActivations:
        """Count.

        Args:
            spec: the model.
            parallel: the grid.
            load: of one rank.
            itemsize: bytes of an activation.
            is_cpu: attention goes sequence by sequence and copies the results together.
        """
        row = load.tokens * itemsize  # one column of activations
        stream_row = row // parallel.tensor if _splits_stream(parallel) else row
        query = spec.num_heads * spec.head_dim // parallel.tensor
        kv = spec.num_kv_heads * spec.head_dim // parallel.tensor
        ffn = spec.ffn_size // parallel.tensor
        hidden = spec.hidden_size
        qkv = (query + 2 * kv) * row
        gathered = 2 * kv * load.keys * itemsize
        log_sum_exp = load.tokens * (spec.num_heads // parallel.tensor) * _FP32
        output = query * row * (2 if is_cpu else 1)
        seen = query * row + gathered if parallel.context > 1 else qkv + (query + kv) * row
        # Cutting q out of what the product made copies it, but where there is one KV head.
        query_copy = query * row if spec.num_kv_heads > parallel.tensor else 0
        backward_of_keys = 2 * gathered if parallel.context > 1 else 0
        fc1_gradient, fc2_gradient = (n * hidden * ffn * itemsize for n in (2, 1))
        return cls(
            stream=hidden * stream_row,
            norms=4 * hidden * stream_row + 2 * _FP32 * (stream_row // itemsize),
            attention=seen + output + log_sum_exp,
            attention_inputs=qkv + query_copy + query * row,
            mlp=3 * ffn * row,
            mlp_backward=hidden * stream_row
            + max(
                3 * ffn * row,  # SwiGLU: gradients of its output, of gate and up; silu
                ffn * row + fc2_gradient,
                hidden * row - ffn * row + fc1_gradient,
            ),
            attention_backward=query * row + 2 * qkv + backward_of_keys - 3 * ffn * row,
        )

    def kept(self, recompute: str) -> int:
        """Bytes that wait for the backward pass."""
        if recompute == "full":
            return self.stream
        attention = self.attention_inputs if recompute == "core_attn" else self.attention
        return self.norms + attention + (0 if recompute == "mlp" else self.mlp)

    def backward(self, recompute: str) -> int:
        """Most that one layer's backward pass needs beside what all layers keep."""
        made_again = {
            "none": 0,
            "full": self.kept("none") - self.stream,
            "core_attn": 0,
            "mlp": self.mlp,
        }[recompute]
        at_mlp = made_again + self.mlp_backward
        attention = self.attention if recompute == "core_attn" else 0
        at_attention = (0 if recompute == "mlp" else made_again) + attention
        return max(at_mlp, at_attention + self.attention_backward)


@dataclass(frozen=True)
class EdgeActivations:
    """Bytes at the ends of the model, for one micro-batch.

    Attributes:
        data: token ids, positions, the loss's inputs, the rotary table.
        final_norm: what it keeps, its output, and the tokens of other ranks gathered for the head.
        head: the head's kept inputs and gradients and its largest chunk of logits.
        head_backward: what its backward pass needs beside what the layers keep.
        embedding_backward: the embedding's dense gradient.
        gather_buffer: Megatron's buffer for tokens of other tensor parallel ranks, once for all.
        masks: of a CPU's attention kernel, once for all.
    """

    data: int
    final_norm: int
    head: int
    head_backward: int
    embedding_backward: int
    gather_buffer: int
    masks: int

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        parallel: ParallelConfig,
        load: PackLoad,
        itemsize: int,
        *,
        is_cpu: bool,
    ) -> EdgeActivations:
        """Count; arguments as of `LayerActivations.of`."""
        hidden = spec.hidden_size
        is_split = _splits_stream(parallel)
        whole = load.tokens * hidden * itemsize
        stream = whole // parallel.tensor if is_split else whole
        columns = padded_vocab_size(spec.vocab_size, parallel.tensor) // parallel.tensor
        rotary = 2 * load.tokens * spec.head_dim * itemsize
        response = load.response_tokens * hidden * itemsize
        return cls(
            data=load.tokens * _TOKEN_BYTES + load.response_tokens * _RESPONSE_TOKEN_BYTES + rotary,
            final_norm=2 * stream + (whole if is_split else 0),
            head=2 * response + _logits_bytes(parallel, load, columns, hidden, itemsize, is_cpu),
            # The gradient by the hidden states of all tokens; the norm's is made in fp32.
            head_backward=response + whole + stream + 3 * stream // itemsize * _FP32,
            embedding_backward=columns * hidden * itemsize,
            gather_buffer=whole if is_split else 0,
            masks=load.mask_elements * itemsize if is_cpu else 0,
        )


def _splits_stream(parallel: ParallelConfig) -> bool:
    """Whether tensor parallel ranks share the tokens between their regions."""
    return parallel.sequence_parallel and parallel.tensor > 1


def _logits_bytes(
    parallel: ParallelConfig, load: PackLoad, columns: int, hidden: int, itemsize: int, is_cpu: bool
) -> int:
    """The LM head's largest chunk (parallel/vocab_logprobs.py), or its check on whole logits."""
    chunk_tokens = min(load.response_tokens, max(1, CHUNK_BYTES // (columns * itemsize)))
    block_bytes = CPU_BLOCK_BYTES if is_cpu else ACCELERATOR_BLOCK_BYTES
    block_rows = min(chunk_tokens, max(1, block_bytes // (_FP32 * columns)))
    # A CPU widens a block of 16-bit logits once more, inside a product of both types.
    num_blocks = 2 + (is_cpu and itemsize < _FP32)
    blocks = num_blocks * block_rows * columns * _FP32
    # A 16-bit product is added to the fp32 sum block by block; a CPU widens it first.
    widened = itemsize + (_FP32 if is_cpu else 0)
    sum_block = 0 if itemsize == _FP32 else min(columns, GRADIENT_BLOCK_COLUMNS) * hidden * widened
    chunk = chunk_tokens * columns * itemsize + max(blocks, sum_block)
    # Logits of this rank, of every rank, put together, widened, divided, their softmax.
    check_row = columns * (itemsize + parallel.tensor * (2 * itemsize + 3 * _FP32))
    return max(chunk, min(PLAIN_TOKENS, load.response_tokens) * check_row)
