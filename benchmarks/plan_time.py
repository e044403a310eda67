"""Seconds of stages as `cli.plan` models them, beside what this CPU takes.

First the "device" is calibrated: the rates of a matrix product, of attention and of a pass over
memory on one core, gloo's bandwidth and latency between two ranks; and, from an update of one
learner on one rank, how fast passes over memory really are, which takes what products and attention
leave. Of the engine: the time of a step, of drawing a token and of reading the cache, from three
batches of one model. Then other sizes, lengths and layouts are predicted: updates and log-probs of
the learner, sampling of the engine.

The fastest of --turns counts, of every side: other work on the machine only ever slows. With
--cpu-time processor time counts instead of wall clock, for a busy machine: then what a rank waits
for, idle stages and what its peers send, is left out of both sides.
Fails where a prediction is further off than 25%.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._shapes import Shape

if TYPE_CHECKING:
    from benchmarks._learner_cases import LearnerCase
    from r2vpo_megatron.models.spec import ModelSpec
    from r2vpo_megatron.planning.devices import Device
    from r2vpo_megatron.planning.learner_time import LearnerTimes

Clock = Callable[[], float]

TOLERANCE = 0.25
DEEP = Shape(256, 6, 8, 4, 1024, 8192, 32)
WIDE = Shape(768, 4, 12, 4, 2304, 16384, 64)
LARGE_VOCABULARY = Shape(256, 4, 8, 4, 768, 65536, 32)
PROMPT_TOKENS = 32
# Model, responses, tokens of each: three to calibrate the engine, and others.
ENGINE_CALIBRATION = ((DEEP, 4, 128), (DEEP, 64, 128), (DEEP, 32, 384))
ENGINE_CASES = ((DEEP, 16, 256), (WIDE, 16, 96), (WIDE, 64, 96), (LARGE_VOCABULARY, 32, 128))


def learner_cases() -> list[LearnerCase]:
    """The first one calibrates."""
    from benchmarks._learner_cases import LearnerCase
    from r2vpo_megatron.config import ParallelConfig

    def layout(tokens: int = 1024, **fields: Any) -> ParallelConfig:
        return ParallelConfig(max_tokens_per_micro_batch=tokens, **fields)

    fours, eights = (512,) * 4, (512,) * 8
    return [
        LearnerCase("deep", DEEP, layout(), fours),
        LearnerCase("deep, 2,048 tokens", DEEP, layout(2048), (2048,) * 2),
        LearnerCase("deep, recompute full", DEEP, layout(recompute="full"), fours),
        LearnerCase("wide", WIDE, layout(), fours),
        LearnerCase("vocabulary", LARGE_VOCABULARY, layout(), fours),
        LearnerCase("wide, TP2", WIDE, layout(tensor=2), fours),
        LearnerCase("wide, PP2", WIDE, layout(512, pipeline=2), eights),
        LearnerCase("wide, DP2", WIDE, layout(data=2), eights),
        LearnerCase("deep, CP2", DEEP, layout(2048, context=2), (2048,) * 2),
    ]


CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}


def fastest(turns: int, work: Callable[[], Any], clock: Clock) -> float:
    """Seconds of the fastest of some turns."""
    seconds = []
    for _ in range(turns):
        start = clock()
        work()
        seconds.append(clock() - start)
    return min(seconds)


def measure_rates(
    rank: int, world_size: int, init_method: str, turns: int, clock: Clock
) -> dict[str, float]:
    """Of one core: products, attention, passes over memory; between two ranks: gloo."""
    import torch
    import torch.distributed as dist
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    large, small = torch.zeros(4 << 20), torch.zeros(1)
    rates = {}
    for name, tensor in (("large", large), ("small", small)):
        rates[name] = fastest(
            4 * turns, lambda tensor=tensor: dist.all_reduce(tensor), time.perf_counter
        )
    dist.destroy_process_group()
    left, right = torch.randn(1024, 768), torch.randn(768, 2304)
    query = torch.randn(1, 8, 512, 64)
    source, target = torch.randn(16 << 20), torch.empty(16 << 20)
    product = 2 * left.numel() * right.shape[1]
    kernel = 2 * query.numel() * 512
    rates["product"] = product / fastest(4 * turns, lambda: left @ right, clock)
    rates["attention"] = kernel / fastest(
        4 * turns, lambda: scaled_dot_product_attention(query, query, query, is_causal=True), clock
    )
    # One tensor read, one written.
    passing = fastest(4 * turns, lambda: torch.mul(source, 2, out=target), clock)
    rates["stream"] = 8 * source.numel() / passing
    return rates


def bare_device(turns: int, clock: Clock) -> Device:
    """The CPU at the rates that its kernels reach."""
    from r2vpo_megatron.planning.devices import find_device
    from tests.distributed.ranks import run_ranks

    rates = run_ranks(2, measure_rates, turns, clock, timeout_seconds=300.0)[0]
    num_bytes = 4 * (4 << 20)
    link = num_bytes / (rates["large"] - rates["small"])  # an all-reduce of two moves it once
    print(
        f"one core: products {rates['product'] / 1e9:.0f}, attention "
        f"{rates['attention'] / 1e9:.0f} GFLOP/s, memory {rates['stream'] / 1e9:.1f} GB/s; gloo "
        f"{link / 1e9:.2f} GB/s, {rates['small'] * 1e6:.0f} us"
    )
    return dataclasses.replace(
        find_device("cpu"),
        peak_flops=rates["product"],
        attention_efficiency=rates["attention"] / rates["product"],
        memory_bandwidth=rates["stream"],
        node_bandwidth=link,
        network_bandwidth=link,
        collective_seconds=rates["small"],
    )


def fit_memory(device: Device, case: LearnerCase, model_dir: Path, seconds: float) -> Device:
    """The device whose passes over memory take what products and attention leave of an update."""
    halved = dataclasses.replace(device, bandwidth_efficiency=device.bandwidth_efficiency / 2)
    at_full, at_half = (predict_learner(case, model_dir, one).updates for one in (device, halved))
    factor = max(0.1, 1 + (seconds - at_full) / (at_half - at_full))
    print(f"in an update of {case.name!r} passes over memory take {factor:.2f} times as long")
    efficiency = device.bandwidth_efficiency / factor
    return dataclasses.replace(device, bandwidth_efficiency=efficiency)


def predict_learner(case: LearnerCase, model_dir: Path, device: Device) -> LearnerTimes:
    """One update and the log-probs of the same sequences."""
    from benchmarks._learner_cases import PROMPT_SHARE
    from r2vpo_megatron.models.spec import read_model_spec
    from r2vpo_megatron.planning.learner_time import learner_times
    from r2vpo_megatron.planning.workload import Workload

    (length,) = set(case.lengths)
    response = length - length // PROMPT_SHARE
    workload = Workload(
        num_prompts=len(case.lengths),
        responses_per_prompt=1,
        prompt_tokens=length - response,
        response_tokens=response,
        longest_response=response,
        updates=1.0,
        samples_per_update=len(case.lengths),
    )
    return learner_times(read_model_spec(model_dir), case.config, device, workload, 64)


def without_waiting(times: LearnerTimes, case: LearnerCase) -> LearnerTimes:
    """The same but for the time in which stages of a pipeline are idle."""
    from r2vpo_megatron.planning.schedule import idle_share

    parallel = case.parallel
    idle = idle_share(parallel.pipeline, parallel.virtual_pipeline, times.micro_batches)
    return dataclasses.replace(times, idle=0.0, logprobs=times.logprobs / (1 + idle))


def measure_learner(
    rank: int,
    world_size: int,
    init_method: str,
    case: LearnerCase,
    model_dir: Path,
    turns: int,
    clock: Clock,
) -> tuple[float, float]:
    """Seconds of an update and of the log-probs of the same sequences."""
    from benchmarks._learner_cases import RATIO_PENALTY, running_learner

    with running_learner(rank, init_method, case, model_dir) as (actor, batches):
        actor.update(batches, RATIO_PENALTY, policy_version=0)  # the first makes the moments
        update = fastest(turns, lambda: actor.update(batches, RATIO_PENALTY, 0), clock)
        return update, fastest(turns, lambda: actor.compute_logprobs(batches), clock)


def check_learner(turns: int, clock: Clock) -> list[float]:
    """Calibrate on the first case, predict the others; relative errors."""
    from benchmarks.convert import write_checkpoint
    from tests.distributed.ranks import run_ranks

    device = bare_device(turns, clock)
    errors: list[float] = []
    for number, case in enumerate(learner_cases()):
        with tempfile.TemporaryDirectory(prefix="plan-time-") as folder:
            model_dir = Path(folder) / "model"
            write_checkpoint(case.shape, case.architecture, model_dir)
            ranks = run_ranks(
                case.parallel.num_ranks,
                measure_learner,
                case,
                model_dir,
                turns,
                clock,
                timeout_seconds=900.0,
            )
            update, logprobs = (max(seconds) for seconds in zip(*ranks, strict=True))
            if number == 0:
                device = fit_memory(device, case, model_dir, update)
            times = predict_learner(case, model_dir, device)
            if clock is CLOCKS["processor"]:
                times = without_waiting(times, case)
        errors.append(print_row(f"update     {case.name}", times.updates, update))
        errors.append(print_row(f"log-probs  {case.name}", times.logprobs, logprobs))
    return errors[1:]  # the first made the factor


def serve_engine(
    connection: Any, folder: Path, shape: Shape, batches: list, turns: int, clock: Clock
) -> None:
    """A child with an engine: fastest seconds of each (responses, tokens)."""
    from r2vpo_megatron.rollout.engine_settings import engine_environment

    os.environ.update(engine_environment("cpu", 1))
    import numpy as np

    from r2vpo_megatron.records import GenerationRequest
    from r2vpo_megatron.rollout.sampling import SamplingSettings
    from r2vpo_megatron.rollout.vllm_engine import VLLMEngine

    engine = VLLMEngine(
        folder, dtype="float32", max_model_len=1024, kv_cache_bytes=256 << 20, max_num_seqs=64
    )
    random = np.random.default_rng(0)
    prompt = tuple(random.integers(0, shape.vocab, PROMPT_TOKENS).tolist())
    seconds = []
    for responses, tokens in batches:
        requests = [GenerationRequest(f"0.{index}", prompt, index) for index in range(responses)]
        sampling = SamplingSettings.for_training(tokens, ())
        engine.generate(requests, sampling)
        seconds.append(fastest(turns, lambda: engine.generate(requests, sampling), clock))  # noqa: B023
    connection.send(seconds)
    engine.shutdown()


def measure_engine(
    shape: Shape, batches: list[tuple[int, int]], turns: int, clock: Clock
) -> list[float]:
    """Seconds of each batch of one model."""
    from benchmarks.convert import write_checkpoint

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="plan-time-") as folder:
        model_dir = Path(folder) / "model"
        write_checkpoint(shape, "qwen2", model_dir)
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(
            target=serve_engine, args=(sender, model_dir, shape, batches, turns, clock)
        )
        child.start()
        sender.close()
        try:
            seconds: list[float] = receiver.recv()
        finally:
            child.join()
    return seconds


@functools.cache
def engine_spec(shape: Shape) -> ModelSpec:
    """Of the model that `measure_engine` writes."""
    from benchmarks.convert import model_config
    from r2vpo_megatron.models.spec import read_model_spec

    with tempfile.TemporaryDirectory(prefix="plan-time-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model_config(shape, "qwen2")))
        return read_model_spec(folder)


def predict_engine(device: Device, shape: Shape, responses: int, tokens: int) -> float:
    """Seconds of one batch."""
    from r2vpo_megatron import config as c
    from r2vpo_megatron.planning.engine_memory import engine_memory
    from r2vpo_megatron.planning.rollout_time import rollout_times
    from r2vpo_megatron.planning.workload import Workload

    config = c.RunConfig(
        model=c.ModelConfig(path="unused", dtype="float32"),
        rollout=c.RolloutConfig(
            max_prompt_tokens=PROMPT_TOKENS,
            max_response_tokens=tokens,
            max_num_seqs=64,
            kv_cache_bytes=256 << 20,
        ),
    )
    spec = engine_spec(shape)
    workload = Workload(1, responses, PROMPT_TOKENS, tokens, tokens, 1.0, responses)
    memory = engine_memory(spec, config, device)
    times = rollout_times(spec, config, device, workload, memory)
    return times.prefill + times.decode


def check_engine(turns: int, clock: Clock) -> list[float]:
    """Calibrate by some batches of one model, predict others; relative errors."""
    by_shape: dict[Shape, list[tuple[int, int]]] = {}
    for shape, *batch in (*ENGINE_CALIBRATION, *ENGINE_CASES):
        by_shape.setdefault(shape, []).append(tuple(batch))
    measured = {
        (shape, *batch): seconds
        for shape, batches in by_shape.items()
        for batch, seconds in zip(
            batches, measure_engine(shape, batches, turns, clock), strict=True
        )
    }
    calibration = [(case, measured[case]) for case in ENGINE_CALIBRATION]
    device = fit_engine(bare_device(turns, clock), calibration)
    seconds_of = ", ".join(f"{seconds:.2f} s" for _, seconds in calibration)
    print(
        f"engine: {device.step_seconds * 1e3:.2f} ms a step, {device.sampler_passes:.0f} passes of "
        f"the sampler, cache at {device.cache_efficiency:.2f} of memory's pace; from {seconds_of}"
    )
    names = {DEEP: "deep", WIDE: "wide", LARGE_VOCABULARY: "vocabulary"}
    return [
        print_row(
            f"sampling   {names[shape]}, {responses} x {tokens}",
            predict_engine(device, shape, responses, tokens),
            measured[shape, responses, tokens],
        )
        for shape, responses, tokens in ENGINE_CASES
    ]


def fit_engine(device: Device, measured: list[tuple[tuple[Shape, int, int], float]]) -> Device:
    """Seconds are linear in the time of a step, of the sampler and of reading the cache: solve."""
    import numpy as np

    nothing = {"step_seconds": 0.0, "sampler_passes": 0.0, "cache_efficiency": 1e12}
    one_of_each = {"step_seconds": 1.0, "sampler_passes": 1.0, "cache_efficiency": 1.0}
    without = dataclasses.replace(device, **nothing)
    base = np.array([predict_engine(without, *case) for case, _ in measured])
    columns = []
    for name, value in one_of_each.items():
        one = dataclasses.replace(without, **{name: value})
        columns.append(np.array([predict_engine(one, *case) for case, _ in measured]) - base)
    left = np.array([seconds for _, seconds in measured]) - base
    step, sampler, cache = np.linalg.solve(np.stack(columns, axis=1), left)
    return dataclasses.replace(
        device,
        step_seconds=max(0.0, step),
        sampler_passes=max(0.0, sampler),
        cache_efficiency=1 / max(1e-3, cache),
    )


def print_row(name: str, predicted: float, measured: float) -> float:
    """Print and return the relative error."""
    error = predicted / measured - 1
    print(f"{name:<34}{predicted:>10.3f}{measured:>10.3f}{error:>+8.0%}", flush=True)
    return error


def main() -> None:
    """Calibrate, predict, measure."""
    parser = argparse.ArgumentParser(description="Modelled and measured seconds of stages.")
    parser.add_argument("--turns", type=int, default=5, help="the fastest counts, default 5")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, on a busy machine")
    parser.add_argument("--no-engine", action="store_true", help="the learner alone")
    parser.add_argument("--no-learner", action="store_true", help="the engine alone")
    args = parser.parse_args()
    os.environ.update(CUDA_VISIBLE_DEVICES="")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")
    from benchmarks._learner_cases import import_megatron

    import_megatron()
    print(f"{'seconds':<34}{'model':>10}{'measured':>10}{'error':>8}")
    clock = CLOCKS["processor" if args.cpu_time else "wall"]
    errors = [] if args.no_learner else check_learner(args.turns, clock)
    errors += [] if args.no_engine else check_engine(args.turns, clock)
    within = sum(abs(error) <= TOLERANCE for error in errors)
    print(f"{within} of {len(errors)} predictions within {TOLERANCE:.0%}")
    if within < len(errors):
        sys.exit(1)


if __name__ == "__main__":
    main()
