"""Tokens a second of the rollout engine driven in slices, beside vLLM's own offline loop.

Groups of seeded responses with a long tail of lengths are sampled on every side from the same
weights:
    vllm               `LLM.generate`, the whole batch in one call
    slices             `VLLMEngine.advance` until nothing is left, slices of --slice-seconds
    pool               `RolloutPool.generate`, one engine in a Ray actor, where --pool is given
vllm and slices take turns on the very same engine in this process; what makes their speeds differ
is the loop alone. A tiny model is the hard case: a step takes about a millisecond.
Fails where a token or a log-prob of one side is not that of the other.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

# torch and vLLM are imported once the environment is set.
if TYPE_CHECKING:
    from r2vpo_megatron.records import Generation, GenerationRequest
    from r2vpo_megatron.rollout.sampling import SamplingSettings
    from r2vpo_megatron.rollout.vllm_engine import VLLMEngine

    Generate = Callable[[Sequence[GenerationRequest], SamplingSettings], list[Generation]]

PEER, SLICES, POOL = "vllm", "slices", "pool"
TARGET = 0.97
MAX_PROMPT_TOKENS = 48
COPY_BYTES = 256 << 20


@dataclass(frozen=True)
class Times:
    """What one side takes, a value a round."""

    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of this process


@dataclass(frozen=True)
class Workload:
    """What every side samples."""

    requests: list[GenerationRequest]
    sampling: SamplingSettings


def make_workload(args: argparse.Namespace, vocab_size: int) -> Workload:
    """Groups of one prompt each; a response ends at each token with chance 1 / --mean-tokens."""
    from r2vpo_megatron.records import GenerationRequest
    from r2vpo_megatron.rollout.sampling import SamplingSettings

    random = np.random.default_rng(0)
    requests = []
    for group in range(-(-args.responses // args.group)):
        prompt = random.integers(0, vocab_size, random.integers(8, MAX_PROMPT_TOKENS + 1))
        for index in range(args.group):
            requests.append(
                GenerationRequest(
                    f"{group}.{index}", tuple(prompt.tolist()), seed=group * args.group + index
                )
            )
    # Of nearly uniform random weights; a trained model's stop tokens say nothing of its length.
    num_stops = max(1, vocab_size // args.mean_tokens)
    stops = random.choice(vocab_size, num_stops, replace=False)
    sampling = SamplingSettings.for_training(args.max_tokens, tuple(int(i) for i in stops))
    return Workload(requests[: args.responses], sampling)


def in_slices(engine: VLLMEngine, slice_seconds: float) -> Generate:
    """Drive an engine as a pool does."""

    def generate(
        requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> list[Generation]:
        engine.add_requests(requests, sampling)
        finished = {}
        num_unfinished = len(requests)
        while num_unfinished:
            report = engine.advance(slice_seconds)
            finished.update({generation.sample_id: generation for generation in report.finished})
            num_unfinished = report.num_unfinished
        return [finished[request.sample_id] for request in requests]

    return generate


def by_vllm(engine: VLLMEngine) -> Generate:
    """vLLM's own loop over the engine's LLM, with the very parameters that the engine gives it."""
    from r2vpo_megatron.records import Generation
    from r2vpo_megatron.rollout.vllm_engine import vllm_sampling_params

    llm: Any = engine._llm

    def generate(
        requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> list[Generation]:
        llm.reset_prefix_cache()
        outputs = llm.generate(
            [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests],
            [vllm_sampling_params(request, sampling) for request in requests],
            use_tqdm=False,
        )
        return [
            Generation(
                request.sample_id,
                tuple(output.outputs[0].token_ids),
                np.array(output.outputs[0].logprobs.logprobs, dtype=np.float32),
                output.outputs[0].finish_reason,
                np.empty(0, dtype=np.int64),
            )
            for request, output in zip(requests, outputs, strict=True)
        ]

    return generate


@contextlib.contextmanager
def start_pool(args: argparse.Namespace, model_dir: Path) -> Iterator[Generate]:
    """A RolloutPool of one engine with the settings of the engine in this process."""
    import ray

    from r2vpo_megatron.config import ModelConfig, RolloutConfig, RunConfig, RuntimeConfig
    from r2vpo_megatron.orchestration.cluster import ray_session
    from r2vpo_megatron.orchestration.rollout_pool import RolloutPool

    config = RunConfig(
        model=ModelConfig(path=str(model_dir), dtype=args.dtype),
        runtime=RuntimeConfig(device="cpu"),
        rollout=RolloutConfig(
            max_prompt_tokens=MAX_PROMPT_TOKENS,
            max_response_tokens=args.max_tokens,
            max_num_seqs=args.max_num_seqs,
            kv_cache_bytes=args.kv_cache_mib << 20,
            threads_per_engine=args.threads,
            slice_seconds=args.slice_seconds,
            hang_seconds=max(120.0, 5 * args.slice_seconds),
        ),
    )
    with ray_session(config, {"CPU": args.threads}):
        pool = RolloutPool(config, model_dir)
        try:
            ray.get(pool.begin_start())
            pool.finish_start()
            yield pool.generate
        finally:
            pool.stop()


@contextlib.contextmanager
def start_sides(args: argparse.Namespace, model_dir: Path) -> Iterator[dict[str, Generate]]:
    """All sides, ready to sample."""
    from r2vpo_megatron.rollout.vllm_engine import VLLMEngine

    with contextlib.ExitStack() as stack:
        engine = VLLMEngine(
            model_dir,
            dtype=args.dtype,
            max_model_len=MAX_PROMPT_TOKENS + args.max_tokens,
            kv_cache_bytes=args.kv_cache_mib << 20,
            max_num_seqs=args.max_num_seqs,
        )
        stack.callback(engine.shutdown)
        sides = {PEER: by_vllm(engine), SLICES: in_slices(engine, args.slice_seconds)}
        if args.pool:
            sides[POOL] = stack.enter_context(start_pool(args, model_dir))
        yield sides


def require_same(side: str, generations: list[Generation], expected: list[Generation]) -> None:
    """RuntimeError where a side samples something else than vLLM's loop."""
    for ours, theirs in zip(generations, expected, strict=True):
        if ours.token_ids != theirs.token_ids:
            raise RuntimeError(f"{side}: response {ours.sample_id} is another one than vllm's")
        if not np.array_equal(ours.rollout_logprobs, theirs.rollout_logprobs):
            raise RuntimeError(f"{side}: response {ours.sample_id} has other log-probs than vllm's")


def measure(
    sides: dict[str, Generate], workload: Workload, num_rounds: int
) -> tuple[dict[str, Times], int]:
    """Times of each side; they take turns, every other round backwards.

    Returns:
        Times by side, and the number of tokens of one round.
    """
    expected = sides[PEER](workload.requests, workload.sampling)
    for side, generate in sides.items():  # warms up, too
        require_same(side, generate(workload.requests, workload.sampling), expected)
    num_tokens = sum(len(generation.token_ids) for generation in expected)
    times = {side: Times() for side in sides}
    for index in range(num_rounds):
        for side in list(sides)[:: -1 if index % 2 else 1]:
            cpu_start, start = time.process_time(), time.perf_counter()
            generations = sides[side](workload.requests, workload.sampling)
            times[side].wall_seconds.append(time.perf_counter() - start)
            times[side].cpu_seconds.append(time.process_time() - cpu_start)
            require_same(side, generations, expected)
    return times, num_tokens


def copy_bandwidth() -> float:
    """Bytes a second that one thread copies in memory, the fastest of a few."""
    source = np.ones(COPY_BYTES // 8)
    target = np.zeros_like(source)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return COPY_BYTES / min(seconds)


def speed_ratios(peer: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times as fast as the peer, round by round."""
    return [theirs / seconds for theirs, seconds in zip(peer, ours, strict=True)]


def print_table(
    args: argparse.Namespace, times: dict[str, Times], num_tokens: int, weight_bytes: int
) -> None:
    """One row a side; ratios are of neighbours in one round."""
    bandwidth = copy_bandwidth()
    limit = args.max_num_seqs * bandwidth / weight_bytes
    print(
        f"{'side':<10}{'tokens/s':>12}{'x vllm':>10}{'least':>9}{'most':>9}{'by CPU':>10}"
        f"{'of limit':>11}"
    )
    for side, of_side in times.items():
        ratios = speed_ratios(times[PEER].wall_seconds, of_side.wall_seconds)
        by_cpu = speed_ratios(times[PEER].cpu_seconds, of_side.cpu_seconds)
        ratio = statistics.median(ratios)
        speed = num_tokens / statistics.median(of_side.wall_seconds)
        cpu = "-" if side == POOL else f"{statistics.median(by_cpu):.3f}"
        mark = " *" if ratio < TARGET else ""
        print(
            f"{side:<10}{speed:>12,.0f}{ratio:>10.3f}{min(ratios):>9.3f}{max(ratios):>9.3f}"
            f"{cpu:>10}{speed / limit:>11.2%}{mark}"
        )
    print(
        f"\nx vllm: median of {args.rounds} rounds' ratios, least and most of them. *: below "
        f"{TARGET}.\nby CPU: the same of this process's CPU time, which other processes of a busy "
        "machine\ndisturb less. "
        f"limit: {limit:,.0f} tokens/s, were a step of {args.max_num_seqs} responses no more than "
        f"one copy of\nthe weights, {weight_bytes / 1e6:,.1f} MB at {bandwidth / 1e9:.1f} GB/s "
        "(one thread). A model as small as the default\nlies in the caches and is far from it: "
        "its steps are Python and kernel launches."
    )


def parse_arguments() -> argparse.Namespace:
    """Defaults that take about a minute on two cores."""
    parser = argparse.ArgumentParser(description="Speed of rollout, beside vLLM's own loop.")
    parser.add_argument("--model", type=Path, help="folder; default: a tiny one of random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    sizes = {
        "responses": 256,
        "group": 8,
        "max-tokens": 128,
        "mean-tokens": 64,
        "max-num-seqs": 64,
        "kv-cache-mib": 256,
        "rounds": 9,
        "threads": 1,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--slice-seconds", type=float, default=0.2, help="default 0.2")
    parser.add_argument("--pool", action="store_true", help="add a pool of one engine in Ray")
    return parser.parse_args()


def main() -> None:
    """Start the sides, measure them in turn, print the table."""
    args = parse_arguments()
    from r2vpo_megatron.rollout.engine_settings import engine_environment

    os.environ.update(engine_environment("cpu", args.threads))
    from r2vpo_megatron.models.spec import read_model_spec
    from r2vpo_megatron.testbed.tiny_model import make_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model_dir = args.model
        if model_dir is None:
            model_dir = Path(folder) / "tiny"
            make_tiny_model(model_dir, "qwen2", warm_start=False)
        spec = read_model_spec(model_dir)
        workload = make_workload(args, spec.vocab_size)
        with start_sides(args, model_dir) as sides:
            times, num_tokens = measure(sides, workload, args.rounds)
    weight_bytes = spec.num_parameters * (4 if args.dtype == "float32" else 2)
    print(
        f"{len(workload.requests)} responses in groups of {args.group}, {num_tokens:,} tokens, at "
        f"most {args.max_tokens} each; {args.max_num_seqs} at a time,\n{args.dtype}, "
        f"{args.threads} thread(s), slices of {args.slice_seconds:g} s\n"
    )
    print_table(args, times, num_tokens, weight_bytes)


if __name__ == "__main__":
    main()
