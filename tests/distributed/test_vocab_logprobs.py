"""The LM head over two and four vocabulary shards against one, and its checks in a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from r2vpo_megatron.learner.head_checks import HeadChecks, plain_logprobs
from r2vpo_megatron.parallel.vocab_logprobs import ExpectedSlopes, vocab_parallel_logprobs
from r2vpo_megatron.parallel.vocab_softmax import VocabularyShard
from tests.distributed.ranks import run_ranks

VOCAB_SIZE = 150  # of 256 columns: of four shards one is padded in part and one is all padding
COLUMNS = 256
TEMPERATURE = 0.8


def make_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(21, 16, generator=generator)
    weight = torch.randn(COLUMNS, 16, generator=generator)
    return hidden, weight, torch.randint(VOCAB_SIZE, (21,), generator=generator)


def join(rank: int, world_size: int, init_method: str) -> VocabularyShard:
    dist.init_process_group("gloo", rank=rank, world_size=world_size, init_method=init_method)
    return VocabularyShard.of_rank(VOCAB_SIZE, COLUMNS // world_size, rank, dist.group.WORLD)


def run_head(
    rank: int, world_size: int, init_method: str, is_one_pass: bool
) -> tuple[torch.Tensor, ...]:
    """Log-probs, entropies, plain log-probs, summed hidden gradient, this shard's gradient."""
    shard = join(rank, world_size, init_method)
    hidden, weight, targets = make_inputs()
    weight = weight.chunk(world_size)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    slopes = torch.linspace(-1, 2, len(targets))
    logprobs, entropy = vocab_parallel_logprobs(
        hidden,
        weight,
        targets,
        shard,
        temperature=TEMPERATURE,
        chunk_tokens=8,
        with_entropy=True,
        expected=ExpectedSlopes(lambda _, part: slopes[part], lambda _: None)
        if is_one_pass
        else None,
    )
    loss = (logprobs * slopes).sum()
    if not is_one_pass:
        loss = loss + (entropy * slopes.flip(0)).sum()
    loss.backward()
    plain, _ = plain_logprobs(hidden, weight, targets, shard, TEMPERATURE, VOCAB_SIZE)
    dist.all_reduce(hidden.grad)
    dist.destroy_process_group()
    return logprobs.detach(), entropy.detach(), plain, hidden.grad, weight.grad


@pytest.mark.parametrize("is_one_pass", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_equal_log_softmax_in_float64(world_size, is_one_pass):
    results = run_ranks(world_size, run_head, is_one_pass)
    hidden, weight, targets = (x.double() if x.is_floating_point() else x for x in make_inputs())
    hidden.requires_grad_()
    weight.requires_grad_()
    log_softmax = (hidden @ weight[:VOCAB_SIZE].t() / TEMPERATURE).log_softmax(dim=1)
    logprobs = log_softmax.gather(1, targets[:, None])[:, 0]
    entropy = -(log_softmax.exp() * log_softmax).sum(dim=1)
    slopes = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    loss = (logprobs * slopes).sum()
    if not is_one_pass:
        loss = loss + (entropy * slopes.flip(0)).sum()
    loss.backward()
    for rank_logprobs, rank_entropy, plain, hidden_grad, _ in results:
        for ours, expected in (
            (rank_logprobs, logprobs),
            (rank_entropy, entropy),
            (plain, logprobs),
            (hidden_grad, hidden.grad),
        ):
            torch.testing.assert_close(ours.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(rank_logprobs, results[0][0])
    weight_grad = torch.cat([result[4] for result in results]).double()
    torch.testing.assert_close(weight_grad, weight.grad, rtol=1e-5, atol=1e-5)
    assert weight_grad[VOCAB_SIZE:].abs().max() == 0


def settle_checks(rank: int, world_size: int, init_method: str, fault: str) -> Any:
    """Only rank 0 sees the fault; what `settle` then says on every rank."""
    shard = join(rank, world_size, init_method)
    hidden, weight, targets = make_inputs()
    weight = weight.chunk(world_size)[rank]
    checks = HeadChecks(torch.device("cpu"), compare_plain=True)
    logprobs, _ = vocab_parallel_logprobs(hidden, weight, targets, shard)
    if rank == 0:
        if fault == "plain path":
            logprobs = logprobs - torch.nn.functional.one_hot(torch.tensor(20), 21) * 0.01
        elif fault == "above 0":
            logprobs = logprobs + torch.nn.functional.one_hot(torch.tensor(3), 21) * 200.0
        elif fault == "slopes":
            checks.report_slopes(torch.tensor(0.01))
    checks.report_logprobs(logprobs)
    checks.report_logprobs(logprobs[:0])
    checks.report_plain(logprobs, hidden, weight, targets, shard, 1.0, VOCAB_SIZE)
    checks.report_plain(logprobs + 9, hidden, weight, targets, shard, 1.0, VOCAB_SIZE)  # once only
    try:
        return checks.settle(torch.float32)
    except RuntimeError as error:
        return str(error)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("plain path", "differ from log_softmax by 0.01"),
        ("above 0", "log-prob above 0"),
        ("slopes", "by 0.01 of the largest"),
    ],
)
def test_a_fault_of_one_rank_stops_every_rank(fault, message):
    for outcome in run_ranks(2, settle_checks, fault):
        assert message in outcome


def test_sound_checks_say_how_close_the_plain_path_is():
    outcomes = run_ranks(2, settle_checks, "none")
    assert outcomes[0] == outcomes[1]
    assert 0 <= outcomes[0]["head_check/max"] < 1e-5
