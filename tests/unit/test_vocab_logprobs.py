"""The LM head on one rank against log_softmax in float64."""

from __future__ import annotations

import pytest
import torch

from r2vpo_megatron.parallel.vocab_logprobs import VocabularyShard, vocab_parallel_logprobs


def reference(hidden, weight, targets, vocab_size, temperature):
    logits = (hidden @ weight[:vocab_size].t()) / temperature
    log_softmax = logits.log_softmax(dim=-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(dim=-1)
    return log_softmax.gather(1, targets[:, None])[:, 0], entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_values_and_gradients(temperature, chunk_tokens, with_entropy):
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 16), torch.randn(128, 16)
    targets = torch.randint(0, 100, (23,))
    results = []
    for dtype in (torch.float32, torch.float64):
        h, w = (x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        if dtype == torch.float32:
            shard = VocabularyShard.of_rank(100, 128, 0, None)
            logprobs, entropy = vocab_parallel_logprobs(
                h,
                w,
                targets,
                shard,
                temperature=temperature,
                chunk_tokens=chunk_tokens,
                with_entropy=with_entropy,
            )
        else:
            logprobs, entropy = reference(h, w, targets, 100, temperature)
        loss = (logprobs * torch.linspace(-1, 2, 23, dtype=dtype)).sum()
        if with_entropy:
            loss = loss + (entropy * torch.linspace(1, -3, 23, dtype=dtype)).sum()
        loss.backward()
        results.append((logprobs.double(), h.grad.double(), w.grad.double()))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)
    assert results[0][2][100:].abs().max() == 0  # padded rows get no gradient


def bf16_weight_gradient_error(chunk_tokens):
    """Relative to the fp32 gradient of the same bf16 values."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 16).bfloat16().float() for n in (512, 128))
    targets = torch.randint(0, 128, (512,))
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        h, w = hidden.to(dtype), weight.to(dtype).requires_grad_()
        shard = VocabularyShard.of_rank(128, 128, 0, None)
        logprobs, _ = vocab_parallel_logprobs(h, w, targets, shard, chunk_tokens=chunk_tokens)
        logprobs.sum().backward()
        assert w.grad.dtype == dtype
        gradients.append(w.grad.float())
    return ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()


def test_bf16_gradient_error_does_not_grow_with_the_number_of_chunks():
    assert bf16_weight_gradient_error(2) < 1.2 * bf16_weight_gradient_error(512)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [9.0, 9.0]], requires_grad=True)
    shard = VocabularyShard.of_rank(3, 4, 0, None)
    logprobs, entropy = vocab_parallel_logprobs(
        hidden, weight, torch.tensor([0, 0, 2]), shard, with_entropy=True
    )
    assert logprobs[0].item() == 0.0
    assert logprobs[1].item() == pytest.approx(-2e4)
    assert logprobs[2].item() == pytest.approx(-1.0986123)
    assert entropy[2].item() == pytest.approx(1.0986123)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_no_tokens_still_reach_the_weight():
    hidden = torch.randn(0, 4, requires_grad=True)
    weight = torch.randn(8, 4, requires_grad=True)
    shard = VocabularyShard.of_rank(8, 8, 0, None)
    logprobs, entropy = vocab_parallel_logprobs(
        hidden, weight, torch.zeros(0, dtype=torch.long), shard
    )
    assert entropy is None
    logprobs.sum().backward()
    assert weight.grad.abs().max() == 0


def test_shards_of_a_padded_vocabulary():
    # 300 tokens padded to 512 over four ranks: the last holds nothing but padding.
    shards = [VocabularyShard.of_rank(300, 128, rank, None) for rank in range(4)]
    assert [(shard.start, shard.num_valid) for shard in shards] == [
        (0, 128),
        (128, 128),
        (256, 44),
        (384, 0),
    ]
