"""Seconds and GB/s of a weight push by stage and back end, beside a plain copy of the same bytes.

A learner of two tensor-parallel ranks (gloo between them, random bf16 weights, no optimizer) pushes
to one engine and to two. An engine is a process that opens each bucket, verifies it and copies its
tensors into weights of its own; with --vllm it is a real vLLM engine. As in a run, a sender and its
engines stay connected from push to push; the first push is not counted. Before each push a copy is
timed. Sides:
    copy               of all tensors into memory that is there already, in one process
    safetensors        one rank's whole tensors saved to a file (page cache), loaded, copied
    BACKEND            the push; `wall` from its begin to its verified end on every engine
    BACKEND, whole     the same without a gather: one rank holds whole tensors
Stages of the sender (gather, convert, send, sums) and of the engines (receive, verify, load)
overlap.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks._shapes import Shape

MIB = 2**20
TENSOR_PARALLEL = 2
STAGES = ("gather", "convert", "send", "checksum", "receive", "verify", "load")


SHAPES = {
    "10M": Shape(256, 4, 4, 2, 768, 24000),
    "135M": Shape(576, 30, 8, 4, 1536, 49152),  # SmolLM2-135M's size, with heads that TP 2 divides
    "1B": Shape(1536, 26, 12, 6, 6144, 153376, 128),  # openPangu-Embedded-1B's
}


@dataclass
class Row:
    """What the turns of one side gave, in seconds."""

    wall: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)  # of the one before each
    stages: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int = 0  # resident on the sending rank
    extra_bytes: int = 0  # of that, what was not before the first push


def model_config(shape: Shape) -> dict[str, Any]:
    """config.json."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


class CopyingEngine:
    """Opens buckets, verifies them and copies the tensors into weights of its own."""

    def __init__(self) -> None:
        self._link: Any = None
        self._weights: dict[str, Any] = {}

    def connect(self, connection: Any, rank: int) -> None:
        """See WeightReceiver, of which this is the part that needs no engine."""
        if self._link is not None:
            self._link.close()
        self._link = connection.join(rank)

    def begin(self, version: int) -> None:
        """Open a push."""
        from r2vpo_megatron.rollout.weight_updates import WeightUpdateTracker

        self._tracker = WeightUpdateTracker(version - 1)
        self._tracker.begin(version)

    def load(self, bucket: Any) -> dict[str, float]:
        """Verify and copy; stage times."""
        self._tracker.expect(bucket)
        seconds: dict[str, float] = {}
        tensors = bucket.open(self._link, seconds)
        start = time.perf_counter()
        for name, tensor in tensors.items():
            if name in self._weights:
                self._weights[name].copy_(tensor)
            else:
                self._weights[name] = tensor.clone()
        self._tracker.accept(bucket)
        seconds["load"] = time.perf_counter() - start
        return {f"weight_sync/{stage}_seconds": value for stage, value in seconds.items()}

    def finish(self, version: int, checksum: int) -> dict[str, float]:
        """Verify that the push is whole."""
        self._tracker.require_finishable(version, checksum)
        self._tracker.commit()
        return {}


def serve(pipe: Connection, model_dir: str) -> None:
    """A receiver's process: answer calls until "end"."""
    import torch

    torch.set_num_threads(1)
    receiver: Any = CopyingEngine()
    if model_dir:
        from r2vpo_megatron.rollout.vllm_engine import VLLMEngine

        engine = VLLMEngine(model_dir, dtype="bfloat16", max_model_len=128, max_num_seqs=4)
        receiver = engine.weights
    pipe.send("ready")
    while True:
        method, *args = pipe.recv()
        if method == "end":
            break
        pipe.send(getattr(receiver, method)(*args))
    if model_dir:
        engine.shutdown()


def start_rank(rank: int, folder: str, rendezvous: str) -> tuple[Any, Any, Any]:
    """Build this rank's part of the model with random weights."""
    import torch

    from r2vpo_megatron.device import get_platform

    platform = get_platform("cpu")
    platform.prepare()
    torch.set_num_threads(1)
    from r2vpo_megatron.models.build import build_model
    from r2vpo_megatron.models.spec import read_model_spec
    from r2vpo_megatron.parallel.state import initialize_parallel

    state = initialize_parallel(
        platform,
        rank=rank,
        world_size=TENSOR_PARALLEL,
        tensor=TENSOR_PARALLEL,
        init_method=rendezvous,
    )
    spec = read_model_spec(Path(folder))
    chunks = build_model(spec, state, platform, dtype=torch.bfloat16)
    return chunks, spec, state


def follow(pipe: Connection, folder: str, rendezvous: str) -> None:
    """The second rank: take part in as many gathers as the first one says."""
    from r2vpo_megatron.checkpoint.hf_bridge import iterate_hf_weights

    chunks, spec, state = start_rank(1, folder, rendezvous)
    while pipe.recv() == "gather":
        for _ in iterate_hf_weights(chunks, spec, state):
            pass


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class Leader:
    """The first rank, which sends, and the driver of every side."""

    def __init__(self, args: argparse.Namespace, folder: str, follower: Connection) -> None:
        from r2vpo_megatron.checkpoint.hf_bridge import iterate_hf_weights

        self._args, self._folder, self._follower = args, Path(folder), follower
        model = start_rank(0, folder, f"file://{folder}/rendezvous")
        self._iterate: Callable[[], Any] = lambda: iterate_hf_weights(*model)
        self.whole = dict(self._gather())
        sizes = [t.numel() * t.element_size() for t in self.whole.values()]
        self.num_bytes = sum(sizes)
        self.largest_bucket_bytes = max(args.bucket_mib * MIB, *sizes)  # it takes whole tensors
        self._copies = {name: tensor.clone() for name, tensor in self.whole.items()}
        self._version = 0

    def _gather(self) -> Any:
        self._follower.send("gather")
        return self._iterate()

    def copy(self) -> float:
        """Seconds of a copy into memory that is there."""
        start = time.perf_counter()
        for name, tensor in self.whole.items():
            self._copies[name].copy_(tensor)
        return time.perf_counter() - start

    def safetensors(self) -> float:
        """Seconds of a file's way, in the page cache."""
        from safetensors.torch import load_file, save_file

        path, start = self._folder / "push.safetensors", time.perf_counter()
        save_file(self.whole, path)
        for name, tensor in load_file(path).items():
            self._copies[name].copy_(tensor)
        seconds = time.perf_counter() - start
        path.unlink()
        return seconds

    def connect(self, backend: str, receivers: list[Connection]) -> Any:
        """The back end's sender, joined with these receivers."""
        from r2vpo_megatron.weight_sync import BACKENDS

        sender = BACKENDS[backend](self._args.bucket_mib * MIB)
        if sender.needs_connection:
            connection = sender.offer_connection("127.0.0.1", 1 + len(receivers), 60.0)
            for rank, receiver in enumerate(receivers, start=1):
                receiver.send(("connect", connection, rank))
            sender.join_connection()
            for receiver in receivers:
                receiver.recv()
        return sender

    def push(self, sender: Any, receivers: list[Connection], row: Row, *, whole: bool) -> None:
        """One push, as orchestration/weight_push.py does it."""
        self._version += 1

        def call(method: str, *args: Any) -> list[dict[str, float]]:
            for receiver in receivers:
                receiver.send((method, *args))
            return [receiver.recv() for receiver in receivers]

        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
        start = time.perf_counter()
        call("begin", self._version)
        weights = None if whole else self._gather()
        stream = weights.in_pieces() if weights else self.whole.items()
        buckets = sender.buckets(self._version, stream)
        stages = dict.fromkeys(STAGES, 0.0)
        bucket = next(buckets, None)
        while bucket is not None:
            for receiver in receivers:
                receiver.send(("load", bucket))
            bucket = next(buckets, None)
            loaded = [receiver.recv() for receiver in receivers]
            for stage in ("receive", "verify", "load"):
                stages[stage] += max(times[f"weight_sync/{stage}_seconds"] for times in loaded)
        call("finish", self._version, sender.push_checksum)
        row.wall.append(time.perf_counter() - start)
        metrics = sender.metrics()
        stages |= {stage: metrics[f"weight_sync/{stage}_seconds"] for stage in STAGES[:4]}
        row.stages.append(stages)
        row.peak_bytes = max(row.peak_bytes, resident_bytes("VmHWM"))
        sender.end_push()

    def measure(self, backend: str, receivers: list[Connection]) -> list[Row]:
        """Pushes over one connection, with the gather and without."""
        before = resident_bytes("VmRSS")
        sender = self.connect(backend, receivers)
        rows = [Row(), Row()]
        for whole, row in enumerate(rows):
            self.push(sender, receivers, Row(), whole=bool(whole))
            for _ in range(self._args.turns):
                row.copy.append(self.copy())
                self.push(sender, receivers, row, whole=bool(whole))
            row.extra_bytes = row.peak_bytes - before
        sender.close()
        return rows


def lead(
    args: argparse.Namespace, folder: str, follower: Connection, receivers: list[Connection]
) -> None:
    """In the first rank's process: take turns and print the table."""
    leader = Leader(args, folder, follower)
    for receiver in receivers:
        receiver.recv()
    rows = {"copy": Row(), "safetensors": Row()}
    leader.safetensors()
    for _ in range(args.turns):
        copy = leader.copy()
        rows["copy"].wall.append(copy)
        rows["safetensors"].wall.append(leader.safetensors())
        for name in ("copy", "safetensors"):
            rows[name].copy.append(copy)
    for number in range(1, 1 + len(receivers)):
        for backend in args.backends:
            sharded, whole = leader.measure(backend, receivers[:number])
            rows |= {f"{backend} -> {number}": sharded, f"{backend}, whole -> {number}": whole}
    print_table(args, leader, rows)
    follower.send("end")
    for receiver in receivers:
        receiver.send(("end",))


def print_table(args: argparse.Namespace, leader: Leader, rows: dict[str, Row]) -> None:
    """One row a side, medians; speed beside the copy is the median over the pairs."""
    num_bytes, engine = leader.num_bytes, "vLLM engines" if args.vllm else "engines that copy"
    print(f"\n{args.shape}, bfloat16, {num_bytes / 1e6:,.0f} MB in {len(leader.whole)} tensors")
    print(f"buckets of {args.bucket_mib} MiB, {engine}, median of {args.turns} turns\n")
    header = "".join(f"{'sums' if stage == 'checksum' else stage:>9}" for stage in STAGES)
    print(f"{'side':<28}{'wall s':>8}{'GB/s':>7}{'x copy':>8}{header}{'buckets held':>14}")
    for name, row in rows.items():
        wall = statistics.median(row.wall)
        pairs = zip(row.copy, row.wall, strict=True)
        speed = statistics.median(copy / this for copy, this in pairs)
        text = f"{name:<28}{wall:>8.3f}{num_bytes / wall / 1e9:>7.2f}{speed:>8.2f}"
        for stage in STAGES if row.stages else ():
            text += f"{statistics.median(times[stage] for times in row.stages):>9.3f}"
        if row.extra_bytes:
            text += f"{row.extra_bytes / leader.largest_bucket_bytes:>14.2f}"
        print(text)


def write_checkpoint(folder: Path) -> None:
    """Random weights for vLLM to start from."""
    import torch
    from safetensors.torch import save_file

    from r2vpo_megatron.checkpoint.layout import placements
    from r2vpo_megatron.models.spec import read_model_spec

    groups = placements(read_model_spec(folder))
    shapes = {name: s for group in groups for p in group for name, s in p.hf_shapes.items()}
    tensors = {name: torch.randn(dims).mul_(0.02).bfloat16() for name, dims in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def parse_arguments() -> argparse.Namespace:
    """Defaults that take about a minute on two cores."""
    parser = argparse.ArgumentParser(description="Stages and speed of weight pushes.")
    parser.add_argument("--shape", choices=list(SHAPES), default="135M")
    parser.add_argument("--engines", type=int, default=2, help="pushes to 1..N engines, default 2")
    parser.add_argument("--turns", type=int, default=5, help="of each side, default 5")
    parser.add_argument("--bucket-mib", type=int, default=16, help="default 16")
    parser.add_argument("--backends", nargs="+", default=["shared_memory", "gloo"])
    parser.add_argument("--vllm", action="store_true", help="real vLLM engines")
    parser.add_argument("--scratch", help="folder for files, default the system's")
    return parser.parse_args()


def main() -> None:
    """Start the ranks and the engines, and wait for the table."""
    args = parse_arguments()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if args.vllm:
        from r2vpo_megatron.rollout.engine_settings import engine_environment

        os.environ |= engine_environment("cpu")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="weight-sync-", dir=args.scratch) as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model_config(SHAPES[args.shape])))
        if args.vllm:
            write_checkpoint(Path(folder))
        follower, to_follower = context.Pipe(duplex=False)
        pipes = [context.Pipe() for _ in range(args.engines)]
        rendezvous, ends = f"file://{folder}/rendezvous", [pipe for pipe, _ in pipes]
        processes = [
            context.Process(target=lead, args=(args, folder, to_follower, ends)),
            context.Process(target=follow, args=(follower, folder, rendezvous)),
        ]
        model_dir = folder if args.vllm else ""
        processes += [context.Process(target=serve, args=(end, model_dir)) for _, end in pipes]
        try:
            for process in processes:
                process.start()
            processes[0].join()
            if processes[0].exitcode != 0:
                raise SystemExit("the learner's first rank failed")
            for process in processes[1:]:
                process.join(60)
        finally:
            for process in [p for p in processes if p.is_alive()]:
                process.kill()
    print(
        "\nStages in seconds; the engines' are those of the slowest, summed over the buckets.\n"
        "buckets held: most resident memory (shared memory included) above that before the first\n"
        "push, on the sending rank (in largest tensors where one is larger).\n"
        "x copy: speed beside the copy before it."
    )


if __name__ == "__main__":
    main()
