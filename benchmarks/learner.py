"""Tokens a second and peak memory of a whole update, beside Hugging Face transformers.

An update is forward, R2VPO loss, backward, gradient clipping and AdamW in fp32, from the same
checkpoint and the same packed sequences on every side:
    r2vpo_megatron   MegatronActor.update at TP 1: packed micro-batches, nothing padded
    hf, loop         transformers: one forward and backward a sequence, causal SDPA
    hf, packed       transformers: the same micro-batches, with position ids from which it makes a
                     block-diagonal mask for SDPA; only where micro-batches hold several sequences
transformers gets this project's loss, logits of response tokens alone, and torch's fused AdamW.
Fails where losses or gradient norms of the sides differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

# torch is imported in the children only: a child's peak starts at its parent's resident size.
if TYPE_CHECKING:
    from torch import Tensor

    from r2vpo_megatron.records import PackedBatch

    # One update -> objective per token, gradient norm before clipping.
    Update = Callable[[], tuple[float, float]]

OURS, HF_LOOP, HF_PACKED = "r2vpo_megatron", "hf, loop", "hf, packed"
WRITE = "write the checkpoint"  # not a side: the child that makes the weights
MICRO_BATCH_TOKENS = 2048  # or one sequence, where that is longer
TOLERANCE = 1e-4  # relative, of objective and gradient norm
SLOW_SECONDS = 20.0  # an update that takes longer is timed once
RATIO_PENALTY = 0.04
MAX_GRADIENT_NORM = 1.0
LEARNING_RATE = 1e-6
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model with tied embeddings, and the tokens of one update of it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    update_tokens: int


SHAPES = {
    "10M": Shape(256, 10, 4, 2, 768, 8192, update_tokens=4096),
    "135M": Shape(576, 30, 9, 3, 1536, 49152, update_tokens=2048),  # SmolLM2-135M's
}
DEFAULT_CASES = (("10M", 512), ("10M", 2048))
FULL_CASES = (
    *(("10M", length) for length in (512, 2048, 8192, 16384)),
    *(("135M", length) for length in (512, 2048)),
)


@dataclass(frozen=True)
class Measurement:
    """What a child tells its parent."""

    seconds: list[float]  # a timed update each
    peak_bytes: int  # most resident bytes during updates less those before the model was built
    tokens: int
    objective: float  # of the first update
    gradient_norm: float


def make_micro_batches(shape: Shape, length: int) -> list[PackedBatch]:
    """Sequences of `length` tokens, an eighth of them prompt, in micro-batches of 2,048 tokens."""
    from r2vpo_megatron.data.packing import pack_trajectories
    from r2vpo_megatron.records import Trajectory

    random = np.random.default_rng(0)
    num_prompt, num_response = length // 8, length - length // 8
    trajectories = [
        Trajectory(
            sample_id=f"{index:05d}",
            group_id="group",
            prompt_token_ids=tuple(random.integers(0, shape.vocab, num_prompt).tolist()),
            response_token_ids=tuple(random.integers(0, shape.vocab, num_response).tolist()),
            # Of random weights that are small: nearly uniform.
            behavior_logprobs=(
                -math.log(shape.vocab) + 0.1 * random.normal(size=num_response)
            ).astype(np.float32),
            rollout_logprobs=np.full(num_response, -math.log(shape.vocab), dtype=np.float32),
            reward=0.0,
            advantage=float(random.normal()),
            finish_reason="stop",
            policy_version=0,
            iteration=1,
        )
        for index in range(max(1, shape.update_tokens // length))
    ]
    return pack_trajectories(
        trajectories,
        max_tokens_per_micro_batch=max(length, MICRO_BATCH_TOKENS),
        num_data_parallel_ranks=1,
    )[0]


def hf_config(shape: Shape) -> Any:
    """transformers' description of the model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        attention_bias=False,
        attn_implementation="sdpa",
        dtype="float32",
    )


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """Random weights, in a child: making them must not raise another's peak."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(hf_config(shape)).save_pretrained(folder)


def prepare_ours(batches: Sequence[PackedBatch], folder: Path, threads: int) -> Update:
    """This project's learner on one rank."""
    import torch

    from r2vpo_megatron import config as c
    from r2vpo_megatron.device import get_platform
    from r2vpo_megatron.learner.megatron_actor import MegatronActor
    from r2vpo_megatron.parallel.state import initialize_parallel

    platform = get_platform("cpu")
    rendezvous = f"file://{folder / f'rendezvous-{os.getpid()}'}"
    state = initialize_parallel(platform, rank=0, world_size=1, init_method=rendezvous)
    torch.set_num_threads(threads)
    config = c.RunConfig(
        model=c.ModelConfig(path=str(folder), dtype="float32"),
        algorithm=c.AlgorithmConfig(objective="r2vpo", ratio_penalty=RATIO_PENALTY),
        optimizer=c.OptimizerConfig(lr=LEARNING_RATE, max_gradient_norm=MAX_GRADIENT_NORM),
    )
    actor = MegatronActor(config, folder, state, platform)

    def update() -> tuple[float, float]:
        metrics = actor.update(batches, RATIO_PENALTY)
        return metrics["objective/per_token"], metrics["optimizer/gradient_norm"]

    return update


def prepare_hf(
    shape: Shape, batches: Sequence[PackedBatch], folder: Path, *, one_by_one: bool
) -> Update:
    """transformers' model, a training loop as short as it can be, the fastest AdamW of torch."""
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(hf_config(shape))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01, fused=True)
    passes = [HFPass.of(batch, span) for batch in batches for span in spans(batch, one_by_one)]
    num_tokens = sum(len(single.targets_N) for single in passes)

    def update() -> tuple[float, float]:
        objective = 0.0
        optimizer.zero_grad(set_to_none=True)
        for single in passes:
            loss = single.loss(model) / num_tokens
            loss.backward()
            objective -= loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        return objective, norm.item()

    return update


def spans(batch: PackedBatch, one_by_one: bool) -> list[slice]:
    """What transformers is given at a time: each sequence, or all of the micro-batch."""
    if not one_by_one:
        return [slice(0, len(batch.token_ids))]
    return [slice(*pair) for pair in itertools.pairwise(batch.cumulative_lengths.tolist())]


@dataclass(frozen=True)
class HFPass:
    """Inputs of one forward of transformers: T tokens, N of which predict a response token."""

    token_ids_1T: Tensor
    position_ids_1T: Tensor
    predicting_N: Tensor  # positions
    targets_N: Tensor
    behavior_logprobs_N: Tensor
    advantages_N: Tensor

    @classmethod
    def of(cls, batch: PackedBatch, span: slice) -> HFPass:
        """A part of a micro-batch."""
        import torch

        mask = batch.response_mask[span]
        per_response = (batch.target_ids, batch.behavior_logprobs, batch.advantages)
        return cls(
            torch.from_numpy(batch.token_ids[None, span]),
            torch.from_numpy(batch.position_ids[None, span]),
            torch.from_numpy(np.flatnonzero(mask)),
            *(torch.from_numpy(array[span][mask]) for array in per_response),
        )

    def loss(self, model: Any) -> Tensor:
        """Minus the sum of R2VPO's surrogates."""
        output = model.model(
            input_ids=self.token_ids_1T, position_ids=self.position_ids_1T, use_cache=False
        )
        logits_NV = model.lm_head(output.last_hidden_state[0, self.predicting_N])
        logprobs_N = logits_NV.log_softmax(dim=-1).gather(1, self.targets_N[:, None])[:, 0]
        excess_N = (logprobs_N - self.behavior_logprobs_N).expm1()
        surrogates_N = (1 + excess_N) * self.advantages_N - RATIO_PENALTY * excess_N.square()
        return -surrogates_N.sum()


def measure(args: argparse.Namespace, folder: Path) -> Measurement:
    """In a child: one update to warm up, then the timed ones."""
    import torch

    from r2vpo_megatron.parallel.state import destroy_parallel

    shape = SHAPES[args.shape]
    torch.set_num_threads(args.threads)
    batches = make_micro_batches(shape, args.length)
    if args.side == OURS:
        _import_megatron()
    else:
        import transformers  # noqa: F401
    resident_before = resident_bytes("VmRSS")
    if args.side == OURS:
        update = prepare_ours(batches, folder, args.threads)
    else:
        update = prepare_hf(shape, batches, folder, one_by_one=args.side == HF_LOOP)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds: list[float] = []
    first = None
    for _ in range(args.repeats + 1):
        start = clock()
        figures = update()
        seconds.append(clock() - start)
        first = first or figures
        if len(seconds) > 1 and seconds[-1] > SLOW_SECONDS:
            break
    peak_bytes = resident_bytes("VmHWM") - resident_before
    if args.side == OURS:
        destroy_parallel()
    assert first is not None
    num_tokens = sum(len(batch.token_ids) for batch in batches)
    return Measurement(seconds[1:], peak_bytes, num_tokens, *first)


def _import_megatron() -> None:
    from r2vpo_megatron.device import get_platform

    get_platform("cpu").prepare()
    import r2vpo_megatron.learner.megatron_actor  # noqa: F401


def resident_bytes(field: str) -> int:
    """VmRSS, resident bytes now, or VmHWM, the most of them, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def run_child(side: str, shape: str, length: int, folder: Path) -> Measurement | None:
    """Run this script again for one side and case; None for the one that writes the checkpoint."""
    result = folder / "result.json"
    python = [sys.executable, "-W", "ignore::UserWarning"]  # Megatron's, on packages for GPUs
    case = ["--side", side, "--shape", shape, "--length", str(length), "--folder", str(folder)]
    # The CPU platform refuses to run beside a GPU that Megatron would take.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    subprocess.run([*python, __file__, *sys.argv[1:], *case], check=True, env=environment)
    return Measurement(**json.loads(result.read_text())) if side != WRITE else None


def measure_case(shape: str, length: int) -> dict[str, Measurement]:
    """All sides of one case; RuntimeError where they part."""
    is_packed = SHAPES[shape].update_tokens > length and length < MICRO_BATCH_TOKENS
    sides = [OURS, HF_LOOP, *([HF_PACKED] if is_packed else [])]
    measured: dict[str, Measurement] = {}
    with tempfile.TemporaryDirectory() as name:
        run_child(WRITE, shape, length, Path(name))
        for side in sides:
            result = run_child(side, shape, length, Path(name))
            assert result is not None
            measured[side] = result
    for side in sides[1:]:
        for field in ("objective", "gradient_norm"):
            ours, other = getattr(measured[OURS], field), getattr(measured[side], field)
            if not math.isclose(ours, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
                raise RuntimeError(f"{shape}, {length}: {field} is {ours} here, {other} in {side}")
    return measured


def parse_arguments() -> argparse.Namespace:
    """Defaults that take two or three minutes on two cores."""
    parser = argparse.ArgumentParser(description="Speed and memory of a whole update.")
    parser.add_argument("--full", action="store_true", help="all lengths, and the 135M model")
    threads = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=threads, help=f"default {threads}")
    parser.add_argument("--repeats", type=int, default=3, help="timed updates, default 3")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, for 1 thread on a busy machine"
    )
    parser.add_argument("--shape", choices=list(SHAPES), help="this model alone")
    parser.add_argument("--length", type=int, help="this sequence length alone, in tokens")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def print_rows(shape: str, length: int, measured: dict[str, Measurement]) -> None:
    """One row a side."""
    speeds = {
        side: found.tokens / statistics.median(found.seconds) for side, found in measured.items()
    }
    fastest = max(list(speeds)[1:], key=lambda side: speeds[side])
    same_micro_batches = measured.get(HF_PACKED, measured[HF_LOOP])
    for side, found in measured.items():
        memory = found.peak_bytes / same_micro_batches.peak_bytes
        print(
            f"{shape:<7}{length:>7,}{found.tokens:>8,}  {side:<16}{speeds[side]:>10,.0f}"
            f"{speeds[side] / speeds[fastest]:>7.2f}{found.peak_bytes / MIB:>10,.0f}{memory:>7.2f}",
            flush=True,
        )


def main() -> None:
    """Measure every case, side after side, and print one row each."""
    args = parse_arguments()
    is_quick = not (args.full or args.shape or args.length)
    if args.side == WRITE:
        write_checkpoint(SHAPES[args.shape], args.folder)
        return
    if args.side:
        result = measure(args, args.folder)
        (args.folder / "result.json").write_text(json.dumps(asdict(result)))
        return
    cases = [
        (shape, length)
        for shape, length in (DEFAULT_CASES if is_quick else FULL_CASES)
        if args.shape in (None, shape) and args.length in (None, length)
    ]
    clock = "processor" if args.cpu_time else "wall"
    print(
        f"float32, threads: {args.threads}, {clock} time, median of {args.repeats} updates after a "
        f"warm-up (1 where it takes over {SLOW_SECONDS:g} s)\n\n{'model':<7}{'length':>7}"
        f"{'tokens':>8}  {'side':<16}{'tokens/s':>10}{'x hf':>7}{'peak MiB':>10}{'x hf':>7}"
    )
    for shape, length in cases:
        print_rows(shape, length, measure_case(shape, length))
    print(
        "\nlength: tokens of a sequence. tokens: of an update. x hf: speed against the faster of\n"
        "transformers' sides, memory against the one with the same micro-batches. peak: resident\n"
        "memory of model, gradients, optimizer and activations."
    )


if __name__ == "__main__":
    main()
