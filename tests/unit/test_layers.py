"""Layers with a gradient of their own: equal to the plain formula and autograd's gradient of it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from r2vpo_megatron.device.base import SequenceLayout, attention_per_sequence
from r2vpo_megatron.device.layer_functions import apply_rotary, rms_norm, swiglu
from r2vpo_megatron.models.norm import RMSNorm
from r2vpo_megatron.models.rotary import inverse_frequencies, rotary_table


def _assert_same_values_and_gradients(ours, plain, inputs: list[Tensor]) -> None:
    results = []
    for function in (ours, plain):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        value = function(*leaves)
        probe = torch.cos(torch.arange(value.numel(), dtype=value.dtype)).view_as(value)
        results.append([value.detach(), *torch.autograd.grad((value * probe).sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_swiglu_is_silu_of_the_front_half_times_the_back_half():
    def plain(gate_up: Tensor) -> Tensor:
        gate, up = gate_up[..., :6], gate_up[..., 6:]
        return gate * torch.sigmoid(gate) * up

    _assert_same_values_and_gradients(swiglu, plain, [4.0 * _random(5, 1, 12)])


def test_rotary_turns_each_pair_as_a_complex_number():
    positions = torch.tensor([0, 1, 2, 0, 1, 700])
    frequencies = inverse_frequencies(8, 10000.0)
    cos, sin = rotary_table(positions, frequencies.double(), torch.float64)

    def plain(x: Tensor) -> Tensor:
        angles = positions.double()[:, None, None] * frequencies.double()
        turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(
            torch.ones(()).double(), angles
        )
        return torch.cat([turned.real, turned.imag], dim=-1)

    _assert_same_values_and_gradients(
        lambda x: apply_rotary(x, cos, sin), plain, [_random(6, 3, 8)]
    )


def test_attention_of_a_pack_is_masked_attention_of_the_whole():
    layout = SequenceLayout.of([0, 3, 4, 9], torch.device("cpu"), [0, 5, 6, 11])
    pieces = [((0, 3), (0, 5)), ((3, 4), (5, 6)), ((4, 9), (6, 11))]
    is_seen = torch.zeros(9, 11, dtype=torch.bool)
    for (start, end), (first, last) in pieces:
        for query in range(start, end):
            is_seen[query, first : last - (end - 1 - query)] = True

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~is_seen, -torch.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, value)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_per_sequence(query, key, value, layout)

    inputs = [_random(9, 4, 8), _random(11, 2, 8), _random(11, 2, 8).flip(0)]
    _assert_same_values_and_gradients(ours, plain, inputs)


def test_rms_norm_divides_by_the_root_mean_square():
    config = SimpleNamespace(params_dtype=torch.float64, sequence_parallel=False)
    norm = RMSNorm(config, 12, 1e-3, device=torch.device("cpu"), rms_norm=rms_norm)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * weight

    _assert_same_values_and_gradients(ours, plain, [_random(5, 2, 12), _random(12)])


def test_rms_norm_in_bfloat16_rounds_the_quotient_before_the_weight():
    config = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=False)
    norm = RMSNorm(config, 64, 1e-6, device=torch.device("cpu"), rms_norm=rms_norm)
    norm.weight.data.copy_(_random(64))
    x = _random(32, 64).bfloat16()
    rms = (x.float().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), (x.float() / rms).bfloat16() * norm.weight)
