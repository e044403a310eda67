"""Time and peak memory of checkpoint conversion, beside `cp` of the same bytes.

The checkpoint is openPangu's shape with random bf16 weights, made here and deleted at the end:
    hf -> megatron, megatron -> hf   the two tools' own code, each turn in a child of its own
    cp, cp + fsync                   of the Hugging Face folder; the tools fsync what they write
    mbridge                          a Qwen2 model of the same size: its weights into a live
                                     Megatron model and dist_checkpointing.save; load and back
All read from the page cache. Sides take turns. Fails where a round trip is not byte-identical.
"""

from __future__ import annotations

import argparse
import filecmp
import functools
import importlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._shapes import Shape

# torch is imported in the children only: a child's peak would start at its parent's.

ROOT = Path(__file__).resolve().parents[1]
BARE, TORCH = "python", "python + torch"
CP, CP_FSYNC = "cp", "cp + fsync"
IMPORT, EXPORT = "hf -> megatron", "megatron -> hf"
PEER_IMPORT, PEER_EXPORT = "mbridge, hf -> megatron", "mbridge, megatron -> hf"
MIB = 2**20
BLOCK_ELEMENTS = 8 * MIB  # of random weights, made at a time


SHAPES = {
    "20M": Shape(256, 12, 4, 2, 1024, 32000, head_dim=64),
    "0.1B": Shape(768, 12, 12, 6, 2304, 32000, head_dim=64),
    "0.5B": Shape(1024, 26, 8, 4, 4096, 153376, head_dim=128),
    "1B": Shape(1536, 26, 12, 6, 6144, 153376, head_dim=128),  # openPangu-Embedded-1B's
    "2B": Shape(2048, 28, 16, 8, 8192, 153376, head_dim=128),
}
CURVE = ("0.1B", "0.5B", "1B", "2B")


@dataclass
class Row:
    """What the turns of one side gave."""

    seconds: list[float] = field(default_factory=list)  # of the work alone
    process_seconds: list[float] = field(default_factory=list)  # with start and imports
    peak_bytes: list[int] = field(default_factory=list)


def model_config(shape: Shape, architecture: str) -> dict[str, Any]:
    """config.json; Qwen2's vocabulary is one that mbridge need not pad."""
    config = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 4000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    if architecture == "pangu":
        names = {"model_type": "PanguEmbedded", "architectures": ["PanguEmbeddedForCausalLM"]}
        return config | names | {"bias": True, "vocab_size": shape.vocab}
    names = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    return config | names | {"vocab_size": -(-shape.vocab // 128) * 128}


def write_checkpoint(shape: Shape, architecture: str, folder: Path) -> None:
    """Random weights, a block at a time."""
    import torch

    from r2vpo_megatron.checkpoint.layout import placements
    from r2vpo_megatron.checkpoint.safetensors_stream import tensor_bytes
    from r2vpo_megatron.models.spec import read_model_spec

    folder.mkdir()
    config = json.dumps(model_config(shape, architecture), indent=2)
    (folder / "config.json").write_text(config + "\n")
    groups = placements(read_model_spec(folder))
    shapes = {name: s for group in groups for p in group for name, s in p.hf_shapes.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in shapes.items():
        end = offset + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dims in shapes.values():
            left = math.prod(dims)
            while left:
                count = min(left, BLOCK_ELEMENTS)
                block = torch.randn(count, generator=generator).mul_(0.02).bfloat16()
                file.write(tensor_bytes(block))
                left -= count


def prepare_tool(name: str, arguments: list[str]) -> Callable[[], None]:
    """Import a tool and what it needs; calling the result converts."""
    main = importlib.import_module(f"tools.{name}").main

    def work() -> None:
        code = main(arguments)
        if code:
            raise SystemExit(f"{name} ended with {code}")

    return work


def prepare_peer(hf: Path, megatron: Path, output: Path, mbridge: str, side: str) -> Any:
    """mbridge's Qwen2 bridge on a live model of one rank, without Transformer Engine.

    Its stock model needs that package; the model here is this project's, whose norms have the
    names of Megatron's local layers.
    """
    import torch

    from r2vpo_megatron.device import get_platform

    platform = get_platform("cpu")
    platform.prepare()
    sys.path.insert(0, mbridge)
    dist_checkpointing = importlib.import_module("megatron.core.dist_checkpointing")
    bridge_class: Any = importlib.import_module("mbridge.models.qwen2").Qwen2Bridge
    from transformers import AutoConfig

    from r2vpo_megatron.models.build import build_model
    from r2vpo_megatron.models.spec import read_model_spec
    from r2vpo_megatron.parallel.state import initialize_parallel

    class LocalQwen2Bridge(bridge_class):  # type: ignore[misc]
        _MLP_MAPPING = bridge_class._MLP_MAPPING | {
            "pre_mlp_layernorm.weight": [
                "model.layers.{layer_number}.post_attention_layernorm.weight"
            ]
        }
        _OTHER_MAPPING = bridge_class._OTHER_MAPPING | {
            "input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"]
        }

    rendezvous = f"file://{output.parent / f'rendezvous-{os.getpid()}'}"
    state = initialize_parallel(platform, rank=0, world_size=1, init_method=rendezvous)

    def work() -> None:
        models = build_model(read_model_spec(hf), state, platform, dtype=torch.bfloat16)
        for parameter in models[0].parameters():
            parameter.requires_grad_(False)
        bridge = LocalQwen2Bridge(AutoConfig.from_pretrained(hf))
        sharded = models[0].sharded_state_dict()
        output.mkdir()
        if side == PEER_IMPORT:
            bridge.load_weights(models, str(hf))
            dist_checkpointing.save(sharded, str(output))
        else:
            models[0].load_state_dict(dist_checkpointing.load(sharded, str(megatron)))
            bridge.safetensor_io = bridge._get_safetensor_io(str(hf))
            bridge.save_weights(models, str(output))

    return work


def peak_resident_bytes() -> int:
    """VmHWM of this process, since clear_refs was written to."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def run_side(args: argparse.Namespace) -> None:
    """In a child: one side once; seconds without the imports, and the peak of it all."""
    work: Callable[[], None] | None = None
    if args.side == TORCH:
        import torch  # noqa: F401
    elif args.side == IMPORT:
        arguments = ["--hf", args.hf, "--output", args.output]
        work = prepare_tool("convert_hf_to_megatron", arguments)
    elif args.side == EXPORT:
        arguments = ["--megatron", args.megatron, "--output", args.output]
        work = prepare_tool("convert_megatron_to_hf", [*arguments, "--hf-reference", args.hf])
    elif args.side.startswith("mbridge"):
        paths = (Path(args.hf), Path(args.megatron), Path(args.output))
        work = prepare_peer(*paths, args.mbridge, args.side)
    elif args.side.startswith("write"):
        shape, architecture = SHAPES[args.shape], args.side.split()[1]
        work = functools.partial(write_checkpoint, shape, architecture, Path(args.output))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    start = time.perf_counter()
    if work is not None:
        work()
    result = {"seconds": time.perf_counter() - start, "peak_bytes": peak_resident_bytes()}
    Path(args.result).write_text(json.dumps(result))


def in_child(side: str, shape: str, scratch: Path, mbridge: str = "", **paths: Path) -> Row:
    """Run this script again for one side, so that the peak is that side's own."""
    result = scratch / "result.json"
    command = [sys.executable, "-W", "ignore", __file__, "--side", side, "--shape", shape]
    command += ["--result", str(result), "--mbridge", mbridge]
    for name, path in paths.items():
        command += [f"--{name}", str(path)]
    # The CPU platform refuses to run beside a GPU that Megatron would take.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    if child.returncode != 0:
        raise RuntimeError(f"{side} failed:\n{child.stderr.strip()[-2000:]}")
    measured = json.loads(result.read_text())
    return Row([measured["seconds"]], [wall], [measured["peak_bytes"]])


def copy(source: Path, output: Path, *, fsync: bool) -> Row:
    """`cp -r`, and fsync of every file."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, output], check=True)
    if fsync:
        for path in output.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    return Row([seconds], [seconds])


class Turns:
    """Takes turns over the sides; outputs are deleted after each."""

    def __init__(self, shape: str, scratch: Path, mbridge: str) -> None:
        self.shape, self.scratch, self.mbridge = shape, scratch, mbridge
        self.rows: dict[str, Row] = {}
        self.hf, self.qwen2 = scratch / "pangu", scratch / "qwen2"
        in_child("write pangu", shape, scratch, output=self.hf)
        if mbridge:
            in_child("write qwen2", shape, scratch, output=self.qwen2)

    def take(self, sides: Callable[[], Iterator[tuple[str, Row]]]) -> None:
        """One turn of every side."""
        for side, row in sides():
            total = self.rows.setdefault(side, Row())
            total.seconds += row.seconds
            total.process_seconds += row.process_seconds
            total.peak_bytes += row.peak_bytes

    def baselines(self) -> Iterator[tuple[str, Row]]:
        """The interpreter, alone and with torch."""
        yield from ((side, in_child(side, self.shape, self.scratch)) for side in (BARE, TORCH))

    def copies(self) -> Iterator[tuple[str, Row]]:
        """The same bytes by cp."""
        for side in (CP, CP_FSYNC):
            os.sync()  # the pages that another side left dirty
            output = self.scratch / "copy"
            yield side, copy(self.hf, output, fsync=side == CP_FSYNC)
            shutil.rmtree(output)

    def conversions(self) -> Iterator[tuple[str, Row]]:
        """There and back, for this project and, where it is there, mbridge."""
        pairs = [(self.hf, IMPORT, EXPORT)]
        if self.mbridge:
            pairs.append((self.qwen2, PEER_IMPORT, PEER_EXPORT))
        for hf, there, back in pairs:
            megatron, output = self.scratch / "megatron", self.scratch / "hf"
            for side, target in ((there, megatron), (back, output)):
                os.sync()
                paths = {"hf": hf, "megatron": megatron, "output": target}
                yield side, in_child(side, self.shape, self.scratch, self.mbridge, **paths)
            if there == IMPORT and not filecmp.cmp(
                hf / "model.safetensors", output / "model.safetensors", shallow=False
            ):
                raise RuntimeError("the round trip is not byte-identical")
            shutil.rmtree(megatron)
            shutil.rmtree(output)


def print_table(turns: Turns) -> None:
    """One row a side; speeds are compared with cp turn by turn."""
    num_bytes = (turns.hf / "model.safetensors").stat().st_size
    rows = turns.rows
    bare = statistics.median(rows[BARE].peak_bytes)
    print(
        f"{'side':<26}{'seconds':>9}{'process':>9}{'GB/s':>7}{'x cp':>7}{'peak MiB':>10}"
        f"{'above':>9}"
    )
    for side, row in rows.items():
        text = f"{side:<26}"
        if side in (BARE, TORCH):
            text += " " * 32
        else:
            seconds = statistics.median(row.seconds)
            pairs = zip(rows[CP].seconds, row.seconds, strict=True)
            speed = statistics.median(cp / this for cp, this in pairs)
            text += f"{seconds:>9.2f}{statistics.median(row.process_seconds):>9.2f}"
            text += f"{num_bytes / seconds / 1e9:>7.2f}{speed:>7.2f}"
        if row.peak_bytes:
            peak = statistics.median(row.peak_bytes)
            text += f"{peak / MIB:>10,.0f}{(peak - bare) / MIB:>9,.0f}"
        print(text)
    if not turns.mbridge:
        print(f"{'mbridge':<26}not installed (--mbridge DIR)")


def print_curve(args: argparse.Namespace, scratch: Path) -> None:
    """Peak memory over shapes, one turn each."""
    print(f"\n{'shape':<8}{'MB':>8}{'largest tensor, MiB':>21}{IMPORT:>18}{EXPORT:>18}")
    for name in [args.shape] if args.shape else CURVE:
        folder = scratch / "curve"
        folder.mkdir()
        turns = Turns(name, folder, "")
        turns.take(turns.baselines)
        turns.take(turns.conversions)
        shape, bare = SHAPES[name], turns.rows[BARE].peak_bytes[0]
        largest = 2 * shape.hidden * max(shape.vocab, 2 * shape.ffn) / MIB
        megabytes = (turns.hf / "model.safetensors").stat().st_size / 1e6
        peaks = [(turns.rows[side].peak_bytes[0] - bare) / MIB for side in (IMPORT, EXPORT)]
        print(
            f"{name:<8}{megabytes:>8,.0f}{largest:>21,.0f}{peaks[0]:>18,.0f}{peaks[1]:>18,.0f}",
            flush=True,
        )
        shutil.rmtree(folder)
    print("\npeak MiB above the bare interpreter, torch included")


def parse_arguments() -> argparse.Namespace:
    """Defaults that take under a minute on two cores."""
    parser = argparse.ArgumentParser(description="Time and memory of checkpoint conversion.")
    parser.add_argument("--full", action="store_true", help="openPangu-Embedded-1B's shape, 2.3 GB")
    parser.add_argument("--shape", choices=list(SHAPES), help="default 0.1B")
    parser.add_argument("--turns", type=int, default=3, help="of each side, default 3")
    parser.add_argument("--curve", action="store_true", help="peak memory over shapes alone")
    parser.add_argument("--mbridge", default="", help="folder of `pip install --no-deps -t`")
    parser.add_argument("--scratch", help="folder for the checkpoints, default the system's")
    for name in ("side", "hf", "megatron", "output", "result"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Make the checkpoint, take turns, print the table."""
    args = parse_arguments()
    if args.side:
        run_side(args)
        return
    with tempfile.TemporaryDirectory(prefix="convert-", dir=args.scratch) as folder:
        if args.curve:
            print_curve(args, Path(folder))
            return
        shape = args.shape or ("1B" if args.full else "0.1B")
        turns = Turns(shape, Path(folder), args.mbridge)
        turns.take(turns.baselines)
        for _ in turns.copies():  # to warm up
            pass
        for _ in range(args.turns):
            turns.take(turns.copies)
            turns.take(turns.conversions)
        megabytes = (turns.hf / "model.safetensors").stat().st_size / 1e6
        print(f"{shape} shape, bfloat16, {megabytes:,.0f} MB, median of {args.turns} turns\n")
        print_table(turns)
    print(
        "\nseconds: without start and imports, which `process` has. peak: most resident memory\n"
        "(VmHWM), which counts resident pages of mapped files, but not the page cache; above: the\n"
        "bare interpreter's."
    )


if __name__ == "__main__":
    main()
