"""Time and peak memory of the language-model head on a CPU, forward and backward.

Hidden states and a weight go in; log-probs of given tokens, their entropies and both gradients
come out, the weight's added to an fp32 buffer that is there before, as Megatron's main gradient
is. Sides:
    one pass         vocab_parallel_logprobs that knows its slopes: gradients while logits exist
    general          vocab_parallel_logprobs: logits in chunks, made again in backward
    torch            log_softmax of the whole logits, then gather
    megatron-core    its cross entropy of the whole logits, after the entropy was taken of them
    verl             FusedLinearForPPO, where --verl names its unpacked package
    products alone   logits, hidden gradient, weight gradient: the arithmetic none can do without
Fails where log-probs or gradients of the sides differ.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch is imported in the children only: a child's peak starts at its parent's resident size.
if TYPE_CHECKING:
    from torch import Tensor

    # Log-probs (None where a side has none) and the hidden gradient.
    Outputs = tuple[Tensor | None, Tensor]

PRODUCTS_ALONE = "products alone"
# bf16 logits of a chunk may round the other way than those of the whole: up to 2^-5 at 4 to 8.
LOGPROB_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
VERL_FILE = "verl/utils/experimental/torch_functional.py"
WARM_UP_TOKENS = 64
MIB = 2**20


@dataclass(frozen=True)
class HeadInputs:
    """The same on every side: drawn from one seed."""

    hidden_NH: Tensor
    weight_VH: Tensor
    main_grad_VH: Tensor  # fp32
    targets_N: Tensor
    slopes_N: Tensor  # fp32 derivative of the loss by each log-prob
    chunk_tokens: int | None
    verl: str

    def narrow(self, num_tokens: int) -> HeadInputs:
        """The first tokens alone."""
        tokens = {
            name: getattr(self, name)[:num_tokens].detach()
            for name in ("hidden_NH", "targets_N", "slopes_N")
        }
        tokens["hidden_NH"].requires_grad_()
        rest = {"chunk_tokens": self.chunk_tokens, "verl": self.verl}
        return HeadInputs(
            weight_VH=self.weight_VH, main_grad_VH=self.main_grad_VH, **tokens, **rest
        )


@dataclass(frozen=True)
class Measurement:
    """What a child tells its parent."""

    seconds: list[float]  # a timed pass each
    peak_bytes: int  # most resident bytes less those resident before the first pass
    logprobs: list[float] | None
    grad_hidden_norm: float
    grad_weight_norm: float


def one_pass(inputs: HeadInputs) -> Outputs:
    """The head of this project with its slopes known, the vocabulary whole on one rank."""
    from r2vpo_megatron.parallel.vocab_logprobs import ExpectedSlopes

    def check(mismatch: Tensor) -> None:
        assert mismatch.item() == 0.0

    return _ours(inputs, ExpectedSlopes(lambda _, part: inputs.slopes_N[part], check))


def general_pass(inputs: HeadInputs) -> Outputs:
    """The head of this project for any loss."""
    return _ours(inputs, None)


def _ours(inputs: HeadInputs, expected: Any) -> Outputs:
    from r2vpo_megatron.parallel.vocab_logprobs import vocab_parallel_logprobs
    from r2vpo_megatron.parallel.vocab_softmax import VocabularyShard

    inputs.weight_VH.main_grad = inputs.main_grad_VH
    logprobs_N, _ = vocab_parallel_logprobs(
        inputs.hidden_NH,
        inputs.weight_VH,
        inputs.targets_N,
        VocabularyShard(start=0, num_valid=inputs.weight_VH.shape[0], group=None),
        chunk_tokens=inputs.chunk_tokens,
        with_entropy=True,
        expected=expected,
    )
    return _backward(logprobs_N, inputs)


def torch_pass(inputs: HeadInputs) -> Outputs:
    """Chained, so that the logits die as soon as autograd lets them."""
    logprobs_NV = (inputs.hidden_NH @ inputs.weight_VH.t()).float().log_softmax(dim=-1)
    (logprobs_NV.detach().exp().mul_(logprobs_NV.detach())).sum(dim=-1)  # minus the entropies
    logprobs_N = logprobs_NV.gather(1, inputs.targets_N.unsqueeze(1)).squeeze(1)
    del logprobs_NV
    return _backward(logprobs_N, inputs)


def megatron_pass(inputs: HeadInputs) -> Outputs:
    """Megatron's layout is [sequence, batch, vocabulary]; its loss is the negative log-prob."""
    import torch
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits_N1V = (inputs.hidden_NH @ inputs.weight_VH.t()).unsqueeze(1)
    with torch.no_grad():  # before the cross entropy, which overwrites fp32 logits
        weights_N1V = (logits_N1V - logits_N1V.amax(dim=-1, keepdim=True)).float().exp_()
        normalizers_N1 = weights_N1V.sum(dim=-1)
        normalizers_N1.log() - weights_N1V.mul_(logits_N1V).sum(dim=-1) / normalizers_N1
        del weights_N1V
    losses_N1 = vocab_parallel_cross_entropy(logits_N1V, inputs.targets_N.unsqueeze(1))
    del logits_N1V
    return _backward(-losses_N1.squeeze(1), inputs)


def verl_pass(inputs: HeadInputs) -> Outputs:
    """The one file alone: the package asks for more than this needs."""
    spec = importlib.util.spec_from_file_location("verl_head", Path(inputs.verl) / VERL_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    head = module.FusedLinearForPPO()
    logprobs_N, _ = head(inputs.hidden_NH, inputs.weight_VH, inputs.targets_N)
    return _backward(logprobs_N, inputs)


def products_pass(inputs: HeadInputs) -> Outputs:
    """The logits stand in for their own gradient: the same shape, so the same time."""
    import torch

    with torch.no_grad():
        logits_NV = inputs.hidden_NH @ inputs.weight_VH.t()
        grad_hidden_NH = logits_NV @ inputs.weight_VH
        logits_NV.t() @ inputs.hidden_NH
        return None, grad_hidden_NH


def _backward(logprobs_N: Tensor, inputs: HeadInputs) -> Outputs:
    """Run it, and do for the weight's gradient what Megatron's hook does."""
    logprobs_N.backward(inputs.slopes_N)
    weight_VH, hidden_NH = inputs.weight_VH, inputs.hidden_NH
    if weight_VH.grad is not None:
        inputs.main_grad_VH.add_(weight_VH.grad)
        weight_VH.grad = None
    grad_hidden_NH, hidden_NH.grad = hidden_NH.grad, None
    return logprobs_N.detach(), grad_hidden_NH


SIDES: dict[str, Callable[[HeadInputs], Outputs]] = {
    "one pass": one_pass,
    "general": general_pass,
    "torch": torch_pass,
    "megatron-core": megatron_pass,
    "verl": verl_pass,
    PRODUCTS_ALONE: products_pass,
}


def make_inputs(args: argparse.Namespace) -> HeadInputs:
    """Logits are about standard normal. Drawn in the final dtype: no copy raises the peak."""
    import torch

    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(args.tokens, args.hidden, dtype=dtype, generator=generator)
    weight_VH = torch.randn(args.vocab, args.hidden, dtype=dtype, generator=generator)
    weight_VH.mul_(args.hidden**-0.5)
    return HeadInputs(
        hidden_NH.requires_grad_(),
        weight_VH.requires_grad_(),
        torch.ones(args.vocab, args.hidden).zero_(),  # written, so that it is resident
        torch.randint(args.vocab, (args.tokens,), generator=generator),
        torch.randn(args.tokens, generator=generator),
        args.chunk_tokens or None,
        args.verl,
    )


def measure(run_pass: Callable[[HeadInputs], Outputs], args: argparse.Namespace) -> Measurement:
    """In a child: a pass over a few tokens, then the timed ones; the peak is over all of them."""
    import torch

    from r2vpo_megatron.device import get_platform
    from r2vpo_megatron.parallel.state import destroy_parallel, initialize_parallel

    platform = get_platform("cpu")
    if run_pass is megatron_pass:
        # Its group comes from Megatron's global state. Imported here, lest the import's memory
        # be counted as the head's.
        rendezvous = f"file://{Path(args.result).with_suffix('.rendezvous')}"
        initialize_parallel(platform, rank=0, world_size=1, init_method=rendezvous)
        importlib.import_module("megatron.core.tensor_parallel")
    torch.set_num_threads(args.threads)
    inputs = make_inputs(args)
    resident_before = platform.memory_allocated_bytes()
    outputs = run_pass(inputs.narrow(WARM_UP_TOKENS))
    seconds = []
    for _ in range(args.repeats):
        del outputs  # else the gradients of two passes would be alive at once
        inputs.main_grad_VH.zero_()
        start = time.perf_counter()
        outputs = run_pass(inputs)
        seconds.append(time.perf_counter() - start)
    peak_bytes = platform.peak_memory_bytes() - resident_before
    destroy_parallel()
    logprobs_N, grad_hidden_NH = outputs
    norms = [torch.linalg.vector_norm(grad).item() for grad in (grad_hidden_NH.float(),)]
    norms.append(torch.linalg.vector_norm(inputs.main_grad_VH).item())
    return Measurement(
        seconds, peak_bytes, None if logprobs_N is None else logprobs_N.tolist(), *norms
    )


def measure_in_child(side: str, folder: Path) -> Measurement:
    """Run this script again for one side, so that the peak resident size is that side's own."""
    result = folder / f"{side.replace(' ', '_')}.json"
    python = [sys.executable, "-W", "ignore::UserWarning"]  # Megatron's, on packages for GPUs
    command = [*python, __file__, *sys.argv[1:], "--side", side, "--result", str(result)]
    # The CPU platform refuses to run beside a GPU that Megatron would take.
    subprocess.run(command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    return Measurement(**json.loads(result.read_text()))


def check_agreement(measurements: dict[str, Measurement], dtype: str) -> float:
    """Largest difference of a log-prob from torch's; RuntimeError where the sides part."""
    reference = measurements["torch"]
    differences = [0.0]
    for side, measured in measurements.items():
        if side in ("torch", PRODUCTS_ALONE):
            continue
        pairs = zip(measured.logprobs, reference.logprobs, strict=True)
        differences.extend(abs(value - expected) for value, expected in pairs)
        if not all(difference <= LOGPROB_TOLERANCE[dtype] for difference in differences):
            raise RuntimeError(f"{side}: a log-prob is {max(differences):.1e} away from torch's")
        for field in ("grad_hidden_norm", "grad_weight_norm"):
            norm, expected = getattr(measured, field), getattr(reference, field)
            if not math.isclose(norm, expected, rel_tol=GRADIENT_TOLERANCE[dtype]):
                raise RuntimeError(f"{side}: {field} = {norm}, torch's is {expected}")
    return max(differences)


def print_table(measurements: dict[str, Measurement]) -> None:
    """One row a side: time relative to the products alone, both relative to Megatron-core's."""
    floor = statistics.median(measurements[PRODUCTS_ALONE].seconds)
    peer = measurements["megatron-core"]
    peer_seconds = statistics.median(peer.seconds)
    print(
        f"{'side':<16}{'seconds':>10}{'x products':>12}{'x megatron':>12}{'peak MiB':>11}"
        f"{'x megatron':>12}"
    )
    for side, measured in measurements.items():
        seconds = statistics.median(measured.seconds)
        print(
            f"{side:<16}{seconds:>10.3f}{seconds / floor:>12.2f}{seconds / peer_seconds:>12.2f}"
            f"{measured.peak_bytes / MIB:>11.0f}{measured.peak_bytes / peer.peak_bytes:>12.2f}"
        )


def parse_arguments() -> argparse.Namespace:
    """Defaults that take about a minute on two cores."""
    parser = argparse.ArgumentParser(description="Time and memory of the language-model head.")
    sizes = {"tokens": 2048, "vocab": 32768, "hidden": 512, "repeats": 3}
    for name, default in {**sizes, "threads": os.cpu_count() or 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--chunk-tokens", type=int, default=0, help="of ours; default: by its size")
    parser.add_argument("--dtype", choices=list(LOGPROB_TOLERANCE), default="float32")
    parser.add_argument("--verl", default="", help="folder of `pip install --no-deps -t`")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure each side in a child, check that they agree, print the table."""
    args = parse_arguments()
    if args.side:
        measured = measure(SIDES[args.side], args)
        Path(args.result).write_text(json.dumps(asdict(measured)))
        return
    sides = [side for side in SIDES if side != "verl" or args.verl]
    with tempfile.TemporaryDirectory() as folder:
        measurements = {side: measure_in_child(side, Path(folder)) for side in sides}
    difference = check_agreement(measurements, args.dtype)
    chunks = f"chunks of {args.chunk_tokens:,} tokens" if args.chunk_tokens else "default chunks"
    print(
        f"{args.tokens:,} tokens, vocabulary {args.vocab:,}, hidden size {args.hidden:,}, "
        f"{args.dtype}, {args.threads} threads, {chunks}\n"
        f"forward + backward, median of {args.repeats}\n"
    )
    print_table(measurements)
    print(
        "\npeak: most resident memory less what was resident before the first pass, which is\n"
        "inputs, weight and the buffer of its gradient. Log-probs of the sides agree within "
        f"{difference:.1e}."
    )


if __name__ == "__main__":
    main()
