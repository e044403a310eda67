"""What a conversion says before it writes: real figures, and all that does not map."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from r2vpo_megatron.conversion.hf_export import HfExport, checkpoint_folder
from r2vpo_megatron.conversion.megatron_pieces import ParallelLayout
from r2vpo_megatron.conversion.plan import check_folders, describe, row_blocks
from r2vpo_megatron.conversion.to_hf import plan_to_hf
from r2vpo_megatron.conversion.to_megatron import plan_to_megatron
from tests.published_models import PANGU_7B
from tests.random_checkpoints import make_hf_folder, save_tensors


@pytest.fixture
def pangu_7b(tmp_path: Path) -> Path:
    folder = tmp_path / "pangu-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PANGU_7B))
    return folder


def test_plan_of_the_published_7b_config(pangu_7b: Path, tmp_path: Path) -> None:
    layout = ParallelLayout(tensor=4, pipeline=4, pipeline_layout="8,9,9,8")
    plan = plan_to_megatron(pangu_7b, tmp_path / "out", layout)
    assert plan.spec.num_parameters == 8_030_887_936
    assert plan.source_bytes == 16_061_784_576
    assert len(plan.tensors) + len(plan.dropped) == 479
    assert sum(entry.nbytes for entry in plan.dropped) == 34 * 64 * 4
    # The vocabulary of embedding and LM head is padded; nothing else is added.
    padding = 2 * (153_600 - 153_376) * 4096 * 2
    assert plan.output_bytes == 2 * 8_030_887_936 + padding
    assert len(plan.files) == 16
    assert plan.largest_piece_bytes <= 64 * 2**20
    text = describe(plan)
    for part in (
        "8,030,887,936",
        "16,061,784,576 bytes",
        "stage 0: embedding, layers 0-7 (8)",
        "stage 1: layers 8-16 (9)",
        "stage 3: layers 26-33 (8), final norm, LM head",
        "153,376 rows, padded to 153,600",
        "34 tensors, 8,704 bytes, computed or tied: model.layers.0.self_attn.rotary_emb.inv_freq",
        "and 26 more",
        "only a config.json: its tensors were not checked",
        "about 32 s, if the disk takes 500.00 MB/s",
    ):
        assert part in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensor", "pipeline", "virtual", "counts"),
    [(1, 1, None, [4]), (2, 2, None, [2, 2]), (3, 2, 2, [1, 1, 1, 1])],
)
def test_layout_and_files(
    tmp_path: Path, tensor: int, pipeline: int, virtual: int | None, counts: list[int]
) -> None:
    make_hf_folder(tmp_path / "hf")
    layout = ParallelLayout(tensor, pipeline, virtual)
    plan = plan_to_megatron(tmp_path / "hf", tmp_path / "out", layout)
    assert [len(chunk.layers) for chunk in plan.layout] == counts
    assert sorted(file.name for file in plan.files) == sorted(
        f"__{rank}_{chunk}.distcp"
        for rank in range(tensor * pipeline)
        for chunk in range(virtual or 1)
    )
    spec = plan.spec
    padded_rows = plan.padded_vocab_size - spec.vocab_size
    expected = spec.num_parameters + 2 * padded_rows * spec.hidden_size
    assert plan.output_bytes == 4 * expected
    assert plan.tensors_checked


def test_everything_that_does_not_map_is_listed_at_once(tmp_path: Path) -> None:
    tensors = make_hf_folder(tmp_path / "hf", "qwen2")
    for layer in range(4):
        for part in ("q", "k", "v"):
            del tensors[f"model.layers.{layer}.self_attn.{part}_proj.bias"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(2)
    tensors["model.norm.weight"] = torch.ones(25)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(36, 24, dtype=torch.int8)
    save_tensors(tmp_path / "hf", tensors)
    with pytest.raises(ValueError) as caught:
        plan_to_megatron(tmp_path / "hf", tmp_path / "out", ParallelLayout())
    message = str(caught.value)
    assert "model.layers.0.self_attn.q_norm.weight" in message
    assert "unfilled (missing in the checkpoint): model.layers.0.self_attn.q_proj.bias" in message
    assert "and 4 more" in message  # 12 missing, 8 listed
    assert "model.norm.weight [25], expected [24]" in message
    assert "model.layers.1.mlp.up_proj.weight int8" in message
    assert not (tmp_path / "out").exists()


def test_parts_of_one_tensor_need_one_dtype(tmp_path: Path) -> None:
    tensors = make_hf_folder(tmp_path / "hf")
    name = "model.layers.2.self_attn.k_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    save_tensors(tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match=f"{name} bfloat16, where .* has float32"):
        plan_to_megatron(tmp_path / "hf", tmp_path / "out", ParallelLayout())
    plan = plan_to_megatron(tmp_path / "hf", tmp_path / "out", ParallelLayout(), "bfloat16")
    assert {entry.dtype for entry in plan.tensors} == {torch.bfloat16}
    assert plan.output_bytes == 2 * (plan.spec.num_parameters + 2 * 56 * 24)


def test_norms_may_have_a_dtype_of_their_own(tmp_path: Path) -> None:
    tensors = make_hf_folder(tmp_path / "hf", dtype=torch.bfloat16)
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name].float()
    save_tensors(tmp_path / "hf", tensors)
    plan = plan_to_megatron(tmp_path / "hf", tmp_path / "out", ParallelLayout())
    assert "(bfloat16 and float32, as in the source)" in describe(plan)


def test_a_tied_head_that_is_stored_is_dropped(tmp_path: Path) -> None:
    tensors = make_hf_folder(tmp_path / "hf", "llama", tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_tensors(tmp_path / "hf", tensors)
    plan = plan_to_megatron(tmp_path / "hf", tmp_path / "out", ParallelLayout())
    assert [entry.name for entry in plan.dropped] == ["lm_head.weight"]
    tensors["lm_head.weight"] = torch.ones(3, 3)
    save_tensors(tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match=r"lm_head.weight \[3, 3\], expected \[200, 24\]"):
        plan_to_megatron(tmp_path / "hf", tmp_path / "out", ParallelLayout())


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ParallelLayout(tensor=5), "tensor parallel size 5 does not fit"),
        (ParallelLayout(tensor=0), "tensor parallel size 0 does not fit"),
        (ParallelLayout(pipeline=3), "pipeline size 3 does not divide 4 layers"),
        (ParallelLayout(pipeline=2, pipeline_layout="1,2"), "adds up to 3 layers"),
        (ParallelLayout(pipeline=0), "pipeline size 0: must be at least 1"),
    ],
)
def test_layouts_that_do_not_fit(tmp_path: Path, layout: ParallelLayout, message: str) -> None:
    make_hf_folder(tmp_path / "hf")
    with pytest.raises(ValueError, match=message):
        plan_to_megatron(tmp_path / "hf", tmp_path / "out", layout)


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    make_hf_folder(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'gpt2': must be one of .*PanguEmbedded"):
        plan_to_megatron(tmp_path / "hf", tmp_path / "out", ParallelLayout())


@pytest.mark.parametrize(
    ("output", "relation"),
    [("hf", "is"), ("hf/out", "lies inside"), (".", "contains"), ("link/out", "lies inside")],
)
def test_the_output_must_be_apart_from_the_source(
    tmp_path: Path, output: str, relation: str
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    with pytest.raises(ValueError, match=f"output folder .*: {relation} the folder"):
        check_folders(tmp_path / "hf", tmp_path / output)
    check_folders(tmp_path / "hf", tmp_path / "hf-out")


def test_row_blocks_cover_all_rows_and_no_block_is_too_large() -> None:
    assert row_blocks(10, 2**24) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert row_blocks(3, 2**40) == [(0, 1), (1, 2), (2, 3)]
    assert row_blocks(5, 1) == [(0, 5)]


def test_the_latest_iteration_of_a_run_is_found(tmp_path: Path) -> None:
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    for text, name in (("123\n", "iter_0000123"), ("release", "release")):
        latest.write_text(text)
        with pytest.raises(ValueError, match=f"names {name}, which"):
            checkpoint_folder(tmp_path)
        (tmp_path / name).mkdir()
        assert checkpoint_folder(tmp_path) == tmp_path / name
    latest.write_text("../../etc")
    with pytest.raises(ValueError, match="must hold a number or 'release'"):
        checkpoint_folder(tmp_path)
    latest.unlink()
    assert checkpoint_folder(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="does not exist"):
        checkpoint_folder(tmp_path / "nowhere")


def test_a_checkpoint_without_config_needs_a_reference(tmp_path: Path) -> None:
    (tmp_path / "iter_0000001").mkdir()
    with pytest.raises(ValueError, match="no hf/config.json.*--hf-reference"):
        plan_to_hf(HfExport(tmp_path / "iter_0000001", tmp_path / "out"))


def test_peak_memory_counts_what_is_read(tmp_path: Path) -> None:
    make_hf_folder(tmp_path / "hf")  # float32
    kept, cast = (
        plan_to_megatron(tmp_path / "hf", tmp_path / "out", ParallelLayout(), dtype)
        for dtype in ("keep", "bfloat16")
    )
    assert kept.peak_memory_bytes == 3 * kept.largest_piece_bytes
    # As read (twice as large), as cast, as laid out, and the one before.
    assert cast.peak_memory_bytes == 5 * cast.largest_piece_bytes
    assert "above the interpreter's own, while converting" in describe(cast)


def test_what_is_left_out_and_an_output_in_the_way_are_noted(tmp_path: Path) -> None:
    make_hf_folder(tmp_path / "hf")
    (tmp_path / "hf" / "modules").mkdir()
    plan = plan_to_megatron(tmp_path / "hf", tmp_path / "out", ParallelLayout())
    assert "note: not copied: modules/" in describe(plan)
    assert "not empty" not in describe(plan) and "stopped" not in describe(plan)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    (tmp_path / ".out.converting").mkdir()
    text = describe(plan)
    assert f"note: output folder {tmp_path / 'out'}: exists and is not empty" in text
    assert ".out.converting holds a conversion that stopped; --resume goes on with it" in text
