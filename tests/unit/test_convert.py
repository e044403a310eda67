"""Both conversions: bit-exact at every layout, and what is left when something fails."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from r2vpo_megatron.checkpoint.layout import interleave_qkv
from r2vpo_megatron.checkpoint.torch_dist import TorchDistReader
from r2vpo_megatron.conversion import plan as planning
from r2vpo_megatron.conversion.hf_export import HfExport
from r2vpo_megatron.conversion.megatron_pieces import ParallelLayout
from r2vpo_megatron.conversion.progress import ConversionProgress
from r2vpo_megatron.conversion.to_hf import plan_to_hf
from r2vpo_megatron.conversion.to_megatron import (
    plan_to_megatron,
)
from tests.conversion_runs import LAYOUTS, files_of, same, tensors_of, to_hf, to_megatron
from tests.random_checkpoints import make_hf_folder, save_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pipeline", [1, 2, 3])
@pytest.mark.parametrize("tensor", [1, 2, 3, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ["pangu", "qwen2", "llama"])
def test_round_trip_is_exact_to_the_bit(
    tmp_path: Path, architecture: str, tied: bool, tensor: int, pipeline: int, dtype: torch.dtype
) -> None:
    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    source = make_hf_folder(
        hf, architecture, tied=tied, dtype=dtype, num_files=1 + (tensor + pipeline) % 2
    )
    layout = ParallelLayout(tensor, pipeline, pipeline_layout=LAYOUTS[pipeline])
    to_megatron(hf, megatron, layout)
    weights = sorted(path.name for path in megatron.glob("*.distcp"))
    assert weights == sorted(f"__{rank}_0.distcp" for rank in range(tensor * pipeline))

    to_hf(HfExport(megatron, back, hf_reference=hf))
    written = files_of(back)
    del written["conversion.json"]
    assert written == files_of(hf)

    to_hf(HfExport(megatron, tmp_path / "plain", max_shard_bytes=20_000))
    plain = tensors_of(tmp_path / "plain")
    assert plain.keys() == {name for name in source if not name.endswith("inv_freq")}
    assert all(same(plain[name], source[name]) for name in plain)


def test_what_torch_itself_reads_is_megatrons_layout(tmp_path: Path) -> None:
    # 24 heads in 12 KV groups; ranks of TP 3 hold 12 rows of gate and of up each.
    source = make_hf_folder(tmp_path / "hf", dtype=torch.bfloat16)
    to_megatron(tmp_path / "hf", tmp_path / "megatron", ParallelLayout(3, 2))
    layers = "decoder.layers."
    state = {
        layers + "self_attention.linear_qkv.weight": torch.empty(4, 96, 24).bfloat16(),
        layers + "self_attention.linear_qkv.bias": torch.empty(4, 96).bfloat16(),
        layers + "self_attention.linear_proj.weight": torch.empty(4, 24, 48).bfloat16(),
        layers + "mlp.linear_fc1.weight": torch.empty(4, 72, 24).bfloat16(),
        layers + "mlp.linear_fc1.layer_norm_weight": torch.empty(4, 24).bfloat16(),
        "embedding.word_embeddings.weight": torch.empty(384, 24).bfloat16(),
        "output_layer.weight": torch.empty(384, 24).bfloat16(),
    }
    dcp.load(state, checkpoint_id=tmp_path / "megatron", no_dist=True)

    def stacked(name: str) -> Tensor:
        return torch.stack([source[f"model.layers.{layer}.{name}"] for layer in range(4)])

    gate_up = torch.cat([stacked("mlp.gate_proj.weight"), stacked("mlp.up_proj.weight")], dim=1)
    assert same(state[layers + "mlp.linear_fc1.weight"], gate_up)
    output = stacked("self_attn.o_proj.weight")
    assert same(state[layers + "self_attention.linear_proj.weight"], output)
    norms = stacked("post_attention_layernorm.weight")
    assert same(state[layers + "mlp.linear_fc1.layer_norm_weight"], norms)
    for kind in ("weight", "bias"):
        for layer in range(4):
            query, key, value = (
                source[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"
            )
            fused = state[layers + f"self_attention.linear_qkv.{kind}"][layer]
            assert same(fused, interleave_qkv(query, key, value, 2))
            assert same(fused[:8], torch.cat([query[:4], key[:2], value[:2]]))
    for name, hf_name in (
        ("embedding.word_embeddings", "model.embed_tokens"),
        ("output_layer", "lm_head"),
    ):
        rows = state[name + ".weight"]
        assert same(rows[:200], source[hf_name + ".weight"])
        assert not rows[200:].any()


def test_the_file_of_a_rank_holds_that_ranks_shard(tmp_path: Path) -> None:
    # 2 stages of 2 layers, 2 tensor ranks; 36 rows of gate, 36 of up; 8 rows a KV group, 12 groups.
    make_hf_folder(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "m", ParallelLayout(2, 2))
    layers = "decoder.layers."
    with TorchDistReader(tmp_path / "m") as reader:
        places = {
            key: sorted((chunk.file, chunk.offsets, chunk.sizes) for chunk in tensor.chunks)
            for key, tensor in reader.tensors.items()
        }
    for key, by_rank in {
        layers + "mlp.linear_fc1.weight": [
            [((0, 0), (18, 24)), ((36, 0), (18, 24))],
            [((18, 0), (18, 24)), ((54, 0), (18, 24))],
        ],
        layers + "self_attention.linear_qkv.weight": [[((0, 0), (48, 24))], [((48, 0), (48, 24))]],
        layers + "self_attention.linear_qkv.bias": [[((0,), (48,))], [((48,), (48,))]],
        layers + "mlp.linear_fc2.weight": [[((0, 0), (24, 18))], [((0, 18), (24, 18))]],
        layers + "self_attention.linear_proj.bias": [[((0,), (24,))], []],
    }.items():
        assert places[key] == sorted(
            (f"__{layer // 2 * 2 + rank}_0.distcp", (layer, *offsets), (1, *sizes))
            for layer in range(4)
            for rank, boxes in enumerate(by_rank)
            for offsets, sizes in boxes
        )
    for key, stage in (("embedding.word_embeddings.weight", 0), ("output_layer.weight", 1)):
        assert places[key] == [
            (f"__{2 * stage}_0.distcp", (0, 0), (128, 24)),
            (f"__{2 * stage + 1}_0.distcp", (128, 0), (128, 24)),
        ]


def test_virtual_pipeline_and_small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_hf_folder(tmp_path / "hf")
    monkeypatch.setattr(planning, "BLOCK_BYTES", 1000)  # ten rows of the embedding
    layout = ParallelLayout(2, 2, 2)
    assert plan_to_megatron(tmp_path / "hf", tmp_path / "m", layout).largest_piece_bytes <= 1000
    to_megatron(tmp_path / "hf", tmp_path / "m", layout)
    assert len(list((tmp_path / "m").glob("*.distcp"))) == 8
    to_hf(HfExport(tmp_path / "m", tmp_path / "back", hf_reference=tmp_path / "hf"))
    back = tensors_of(tmp_path / "back")
    assert back.keys() == source.keys()
    assert all(same(back[name], source[name]) for name in source)


@pytest.mark.parametrize(("dtype", "target"), [("bfloat16", torch.bfloat16), ("float32", None)])
def test_a_cast_is_rounded_once_and_stated(
    tmp_path: Path, dtype: str, target: torch.dtype | None
) -> None:
    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    source = make_hf_folder(hf, dtype=torch.float32 if target else torch.bfloat16)
    target = target or torch.float32
    found = to_megatron(hf, megatron, ParallelLayout(2), dtype, verify=True)
    assert "after the cast" in found
    to_hf(HfExport(megatron, back))
    for name, tensor in tensors_of(back).items():
        assert same(tensor, source[name].to(target))
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == dtype
    # And on the way out.
    to_hf(HfExport(megatron, tmp_path / "again", dtype="float32"), verify=True)
    again = tensors_of(tmp_path / "again")
    assert all(same(again[name], source[name].to(target).float()) for name in again)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "float32"


def test_companions_manifest_and_verification(tmp_path: Path) -> None:
    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    source = make_hf_folder(hf, num_files=3)
    found = to_megatron(hf, megatron, ParallelLayout(2, 2, None, "3,1"), verify=True)
    assert found.startswith("verified: ")
    companions = {name: data for name, data in files_of(hf).items() if "safetensors" not in name}
    assert files_of(megatron / "hf") == companions
    manifest = json.loads((megatron / "conversion.json").read_text())
    assert manifest["parameters"] == sum(
        tensor.numel() for name, tensor in source.items() if not name.endswith("inv_freq")
    )
    assert (manifest["tensor_parallel"], manifest["pipeline_layout"]) == (2, [3, 1])
    assert len(manifest["not_written"]) == 4
    listed = manifest["tensors"]
    assert listed.keys() == {name for name in source if not name.endswith("inv_freq")}
    assert listed["lm_head.weight"]["shape"] == [200, 24]
    assert listed["lm_head.weight"]["dtype"] == "float32"
    assert len(listed["lm_head.weight"]["sha256"]) == 64

    to_hf(HfExport(megatron, back), verify=True)
    assert {n: d for n, d in files_of(back).items() if n in companions} == companions
    manifest = json.loads((back / "conversion.json").read_text())
    assert manifest["direction"] == "megatron_to_hf"
    assert manifest["tensors"] == listed


def test_the_companions_of_a_converted_folder_serve_as_reference(tmp_path: Path) -> None:
    make_hf_folder(tmp_path / "hf", num_files=3)
    to_megatron(tmp_path / "hf", tmp_path / "m")
    for number, reference in enumerate([tmp_path / "m" / "hf", None]):
        to_hf(HfExport(tmp_path / "m", tmp_path / f"back{number}", hf_reference=reference))
    back = [tensors_of(tmp_path / f"back{number}") for number in (0, 1)]
    assert back[0].keys() == back[1].keys()
    assert all(same(back[0][name], back[1][name]) for name in back[0])


def test_as_llama(tmp_path: Path) -> None:
    source = make_hf_folder(tmp_path / "hf", auto_map={"AutoModel": "modeling_some.Model"})
    to_megatron(tmp_path / "hf", tmp_path / "m")
    to_hf(HfExport(tmp_path / "m", tmp_path / "back", as_llama=True))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["attention_bias"]) == ("llama", True)
    assert config["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in config
    back = tensors_of(tmp_path / "back")
    assert all(same(back[name], source[name]) for name in back)
    make_hf_folder(tmp_path / "qwen2", "qwen2")
    to_megatron(tmp_path / "qwen2", tmp_path / "m2")
    with pytest.raises(ValueError, match="cannot be written as Llama"):
        plan_to_hf(HfExport(tmp_path / "m2", tmp_path / "out", as_llama=True))


def test_a_tied_head_that_the_reference_stores_comes_back(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    tensors = make_hf_folder(hf, "llama", tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_tensors(hf, tensors)
    to_megatron(hf, tmp_path / "m", verify=True)
    to_hf(HfExport(tmp_path / "m", tmp_path / "back", hf_reference=hf), verify=True)
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    tensors["lm_head.weight"][7, 7] += 1
    save_tensors(hf, tensors)
    with pytest.raises(
        ValueError, match="ties the embeddings, but lm_head.weight .float32. differs"
    ):
        to_megatron(hf, tmp_path / "m2")
    assert not (tmp_path / "m2").exists()


def test_a_run_of_megatron_lm_with_optimizer_state_is_read(tmp_path: Path) -> None:
    source = make_hf_folder(tmp_path / "hf")
    iteration = tmp_path / "run" / "iter_0000012"
    to_megatron(tmp_path / "hf", iteration, ParallelLayout(2))
    shutil.rmtree(iteration / "hf")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(ValueError, match="no hf/config.json.*--hf-reference"):
        plan_to_hf(HfExport(tmp_path / "run", tmp_path / "back"))
    to_hf(HfExport(tmp_path / "run", tmp_path / "back", hf_reference=tmp_path / "hf"), verify=True)
    back = tensors_of(tmp_path / "back")
    assert back.keys() == source.keys()
    assert all(same(back[name], source[name]) for name in source)


def test_the_reference_must_be_the_same_model(tmp_path: Path) -> None:
    make_hf_folder(tmp_path / "hf")
    make_hf_folder(tmp_path / "other", rope_theta=9e9)
    to_megatron(tmp_path / "hf", tmp_path / "m")
    with pytest.raises(ValueError, match="is another model: rope_theta is 500.0 in"):
        plan_to_hf(HfExport(tmp_path / "m", tmp_path / "out", hf_reference=tmp_path / "other"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_and_one_line_anywhere_else() -> None:
    for stream in (Terminal(), io.StringIO()):
        progress = ConversionProgress(stream)
        with progress:
            advance = progress.stage("converting", 3_000_000)
            advance(1_500_000)
            progress.message("a note")
        progress.done("wrote out: 2 files", 3_000_000, 2.0)
        line = "wrote out: 2 files, 3.00 MB in 2.0 s, 0.00 GB/s"
        if isinstance(stream, Terminal):
            for part in ("converting", "1.5/3.0 MB", "a note", line):
                assert part in stream.getvalue()
        else:
            assert stream.getvalue() == line + "\n"


# Faults
