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
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks._shapes import Shape

# torch is imported in the children only: a child's peak starts at its parent's resident size.
if TYPE_CHECKING:
    from torch import Tensor

    from r2vpo_megatron.records import PackedBatch

    # One update -> objective per token, gradient norm before clipping.
    Update = Callable[[], tuple[float, float]]

OURS, HF_LOOP, HF_PACKED = "r2vpo_megatron", "hf, loop", "hf, packed"
MICRO_BATCH_TOKENS = 2048  # or one sequence, where that is longer
TOLERANCE = 1e-4  # relative, of objective and gradient norm
RATIO_PENALTY = 0.04
MAX_GRADIENT_NORM = 1.0
LEARNING_RATE = 1e-6
MIB = 2**20


SHAPES = {
    "10M": Shape(256, 10, 4, 2, 768, 8192),
    "135M": Shape(576, 30, 9, 3, 1536, 49152),  # SmolLM2-135M's
}
UPDATE_TOKENS = {"10M": 4096, "135M": 2048}
DEFAULT_CASES = (("10M", 512), ("10M", 2048))
FULL_CASES = (
    *(("10M", length) for length in (512, 2048, 8192, 16384)),
    *(("135M", length) for length in (512, 2048)),
)


def make_micro_batches(shape: Shape, num_tokens: int, length: int) -> list[PackedBatch]:
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
            policy_versions=np.zeros(num_response, dtype=np.int64),
            iteration=1,
        )
        for index in range(max(1, num_tokens // length))
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
        metrics = actor.update(batches, RATIO_PENALTY, policy_version=0)
        return metrics["objective/mean"], metrics["optimizer/gradient_norm"]

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


class Side:
    """One side in a child; children take turns, so a machine's drift is the same for all."""

    def __init__(self, side: str, shape: str, length: int, folder: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._child = context.Process(
            target=_serve, args=(other_end, side, shape, length, folder, threads)
        )
        self._child.start()
        other_end.close()  # so that recv() ends when the child does
        self.seconds: dict[str, list[float]] = {"wall": [], "processor": []}
        self.num_tokens, self.objective, self.gradient_norm, _ = self._update()  # to warm up
        self.peak_bytes = 0

    def _update(self) -> Any:
        self._connection.send("update")
        return self._connection.recv()

    def time_update(self) -> None:
        """One update; its seconds are kept."""
        *_, (wall, processor) = self._update()
        self.seconds["wall"].append(wall)
        self.seconds["processor"].append(processor)

    def close(self) -> None:
        """Ask for the peak and let the child end."""
        self._connection.send("end")
        self.peak_bytes = self._connection.recv()
        self._child.join()


def _serve(
    connection: Any, side: str, shape_name: str, length: int, folder: Path, threads: int
) -> None:
    """The child: an update whenever the parent asks for one, the peak of memory at the end."""
    import torch

    from r2vpo_megatron.parallel.state import destroy_parallel

    shape = SHAPES[shape_name]
    torch.set_num_threads(threads)
    batches = make_micro_batches(shape, UPDATE_TOKENS[shape_name], length)
    num_tokens = sum(len(batch.token_ids) for batch in batches)
    if side == OURS:
        _import_megatron()
    else:
        import transformers  # noqa: F401
    resident_before = resident_bytes("VmRSS")
    if side == OURS:
        update = prepare_ours(batches, folder, threads)
    else:
        update = prepare_hf(shape, batches, folder, one_by_one=side == HF_LOOP)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    while connection.recv() == "update":
        start = time.perf_counter(), time.process_time()
        figures = update()
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        connection.send((num_tokens, *figures, seconds))
    connection.send(resident_bytes("VmHWM") - resident_before)
    if side == OURS:
        destroy_parallel()


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


def measure_case(shape: str, length: int, args: argparse.Namespace) -> dict[str, Side]:
    """All sides of one case, in turns; RuntimeError where they part."""
    is_packed = UPDATE_TOKENS[shape] > length and length < MICRO_BATCH_TOKENS
    names = [OURS, HF_LOOP, *([HF_PACKED] if is_packed else [])]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        writer = context.Process(target=write_checkpoint, args=(SHAPES[shape], Path(folder)))
        writer.start()
        writer.join()
        sides = {name: Side(name, shape, length, Path(folder), args.threads) for name in names}
        for _ in range(args.repeats):
            for side in sides.values():
                side.time_update()
        for side in sides.values():
            side.close()
    for name in names[1:]:
        for field in ("objective", "gradient_norm"):
            ours, other = getattr(sides[OURS], field), getattr(sides[name], field)
            if not math.isclose(ours, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
                raise RuntimeError(f"{shape}, {length}: {field} is {ours} here, {other} in {name}")
    return sides


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
    return parser.parse_args()


def print_rows(shape: str, length: int, sides: dict[str, Side], clock: str) -> None:
    """One row a side; speeds are compared turn by turn."""
    medians = {name: statistics.median(side.seconds[clock]) for name, side in sides.items()}
    fastest = sides[min(list(medians)[1:], key=lambda name: medians[name])]
    same_micro_batches = sides.get(HF_PACKED, sides[HF_LOOP])
    for name, side in sides.items():
        turns = zip(fastest.seconds[clock], side.seconds[clock], strict=True)
        speed = statistics.median(theirs / this for theirs, this in turns)
        memory = side.peak_bytes / same_micro_batches.peak_bytes
        print(
            f"{shape:<7}{length:>7,}{side.num_tokens:>8,}  {name:<16}"
            f"{side.num_tokens / medians[name]:>10,.0f}{speed:>7.2f}"
            f"{side.peak_bytes / MIB:>10,.0f}{memory:>7.2f}",
            flush=True,
        )


def main() -> None:
    """Measure every case, its sides in turns, and print one row each."""
    args = parse_arguments()
    is_quick = not (args.full or args.shape or args.length)
    # The CPU platform refuses to run beside a GPU that Megatron would take.
    os.environ.update(CUDA_VISIBLE_DEVICES="", TQDM_DISABLE="1")
    # Megatron's on packages for GPUs, torch's on names that Megatron uses.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")
    cases = [
        (shape, length)
        for shape, length in (DEFAULT_CASES if is_quick else FULL_CASES)
        if args.shape in (None, shape) and args.length in (None, length)
    ]
    clock = "processor" if args.cpu_time else "wall"
    print(
        f"float32, threads: {args.threads}, {clock} time, median of {args.repeats} updates after a "
        f"warm-up, the sides in turns\n\n{'model':<7}{'length':>7}"
        f"{'tokens':>8}  {'side':<16}{'tokens/s':>10}{'x hf':>7}{'peak MiB':>10}{'x hf':>7}"
    )
    for shape, length in cases:
        print_rows(shape, length, measure_case(shape, length, args), clock)
    print(
        "\nlength: tokens of a sequence. tokens: of an update. x hf: speed against the faster of\n"
        "transformers' sides, memory against the one with the same micro-batches. peak: resident\n"
        "memory of model, gradients, optimizer and activations."
    )


if __name__ == "__main__":
    main()
