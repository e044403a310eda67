"""The LM head on one rank against log_softmax in float64."""

from __future__ import annotations

import pytest
import torch

from r2vpo_megatron.parallel import vocab_logprobs
from r2vpo_megatron.parallel.vocab_logprobs import ExpectedSlopes, vocab_parallel_logprobs
from r2vpo_megatron.parallel.vocab_softmax import VocabularyShard


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


def penalised(logprobs: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """A loss whose derivative depends on the log-probs, as an objective's does."""
    return ((logprobs - start).exp() * torch.linspace(-1, 2, len(start))).sum()


def penalised_slopes(logprobs: torch.Tensor, start: torch.Tensor, part: slice) -> torch.Tensor:
    weights = torch.linspace(-1, 2, len(start))
    return (logprobs - start[part]).exp() * weights[part]


@pytest.mark.parametrize("has_main_grad", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
def test_one_pass_equals_the_general_path(chunk_tokens, has_main_grad):
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 16), torch.randn(128, 16)
    targets, start = torch.randint(0, 100, (23,)), torch.randn(23) * 0.1 - 5
    shard, mismatches, results = VocabularyShard.of_rank(100, 128, 0, None), [], []
    for is_one_pass in (False, True):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        if has_main_grad:
            w.main_grad = torch.full((128, 16), 0.5)  # of an earlier micro-batch
        expected = ExpectedSlopes(
            lambda logprobs, part: penalised_slopes(logprobs, start, part), mismatches.append
        )
        logprobs, entropy = vocab_parallel_logprobs(
            h,
            w,
            targets,
            shard,
            temperature=0.7,
            chunk_tokens=chunk_tokens,
            with_entropy=True,
            expected=expected if is_one_pass else None,
        )
        penalised(logprobs, start).backward()
        if has_main_grad:
            assert w.grad is None  # Megatron's hook would add it a second time
        results.append((logprobs, entropy, h.grad, w.main_grad - 0.5 if has_main_grad else w.grad))
    for general, one_pass in zip(*results, strict=True):
        torch.testing.assert_close(one_pass, general, rtol=1e-6, atol=1e-6)
    assert results[0][3].abs().max() > 0.1
    assert len(mismatches) == 1
    assert mismatches[0] < 1e-6


def test_one_pass_reports_slopes_it_was_not_told_of():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    mismatches = []
    logprobs, _ = vocab_parallel_logprobs(
        hidden,
        weight,
        torch.arange(6),
        VocabularyShard.of_rank(8, 8, 0, None),
        expected=ExpectedSlopes(lambda logprobs, _: torch.ones_like(logprobs), mismatches.append),
    )
    (1.25 * logprobs.sum()).backward()
    assert mismatches[0].item() == pytest.approx(0.25)


def test_a_token_that_is_all_but_certain_keeps_its_small_logprob():
    """log p = -1.2e-4 beside a logit of 1000, where fp32 numbers are 6e-5 apart."""
    hidden = torch.ones(1, 1)
    weight = torch.tensor([[1000.0], [991.0], [900.0]])
    shard = VocabularyShard.of_rank(3, 3, 0, None)
    logprobs, _ = vocab_parallel_logprobs(hidden, weight, torch.tensor([0]), shard)
    expected = weight.double().t().log_softmax(dim=1)[0, 0].item()
    assert logprobs.item() <= 0
    assert logprobs.item() == pytest.approx(expected, rel=2e-3)


def test_chunks_bound_the_logits(monkeypatch):
    """As many tokens at a time as CHUNK_BYTES of fp32 logits hold."""
    sizes = []
    original = vocab_logprobs.softmax_

    def spy(logits, *args):
        sizes.append(logits.shape)
        return original(logits, *args)

    monkeypatch.setattr(vocab_logprobs, "softmax_", spy)
    monkeypatch.setattr(vocab_logprobs, "CHUNK_BYTES", 4 * 128 * 10 + 1)
    shard = VocabularyShard.of_rank(100, 128, 0, None)
    targets = torch.zeros(25, dtype=torch.long)
    vocab_parallel_logprobs(torch.randn(25, 4), torch.randn(128, 4), targets, shard)
    assert sizes == [(10, 128), (10, 128), (5, 128)]


@pytest.mark.parametrize("is_one_pass", [False, True])
def test_bf16_keeps_the_gradient_of_a_token_that_is_all_but_certain(is_one_pass):
    """p = 0.9996 is 1 in bf16, and 1 - p is all there is of the target's gradient."""
    hidden = torch.ones(1, 1).bfloat16().requires_grad_()
    weight = torch.zeros(64, 1).bfloat16()
    weight[5] = 12.0
    weight.requires_grad_()
    logprobs, _ = vocab_parallel_logprobs(
        hidden,
        weight,
        torch.tensor([5]),
        VocabularyShard.of_rank(64, 64, 0, None),
        expected=ExpectedSlopes(lambda logprobs, _: torch.ones_like(logprobs), lambda _: None)
        if is_one_pass
        else None,
    )
    logprobs.sum().backward()
    p = weight.detach().double().softmax(dim=0)
    expected = torch.nn.functional.one_hot(torch.tensor([5]), 64).double().t() - p
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-2, atol=0.0)
