"""What tools/inspect_checkpoint.py says of whole and of broken checkpoints, of either format."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2vpo_megatron.checkpoint.layout import placements
from r2vpo_megatron.checkpoint.torch_dist import TorchDistReader
from r2vpo_megatron.conversion.inspection import inspect_checkpoint
from r2vpo_megatron.models.spec import read_model_spec
from tools import convert_hf_to_megatron
from tools import inspect_checkpoint as inspect_checkpoint_tool

CONFIG = {
    "model_type": "PanguEmbedded",
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 200,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "bias": True,
    "dtype": "float32",
}


def make_hf(folder: Path, *, num_files: int = 1) -> dict[str, Tensor]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    groups = placements(read_model_spec(folder))
    shapes = {n: s for group in groups for p in group for n, s in p.hf_shapes.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    write_tensors(folder, tensors, num_files)
    return tensors


def write_tensors(folder: Path, tensors: dict[str, Tensor], num_files: int = 1) -> None:
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for number in range(num_files):
        names = list(tensors)[number::num_files]
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "hf"
    make_hf(folder)
    return folder


@pytest.fixture(scope="module")
def megatron(hf: Path) -> Path:
    """The same weights at tensor parallel 2, pipeline parallel 2."""
    output = hf.parent / "megatron"
    arguments = ["--hf", str(hf), "--output", str(output)]
    arguments += ["--tensor-parallel", "2", "--pipeline-parallel", "2"]
    assert convert_hf_to_megatron.main(arguments) == 0
    return output


@pytest.fixture
def broken(megatron: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(megatron, tmp_path / "broken"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    code = inspect_checkpoint_tool.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_report_of_a_hugging_face_folder(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, hf)
    size = (hf / "model.safetensors").stat().st_size
    spec = read_model_spec(hf)
    lines = text.splitlines()
    assert code == 0
    assert lines[:9] == [
        f"{hf}: Hugging Face, safetensors",
        "architecture     pangu: 4 layers, hidden 8, 4 heads of 2, 2 KV heads, ffn 12, "
        "bias on qkv and o, embeddings untied",
        f"parameters       {spec.num_parameters:,}",
        "vocabulary       200",
        f"tensors          55, {4 * spec.num_parameters:,} bytes",
        "optimizer state  none",
        "files",
        f"  model.safetensors  {size:>15,} bytes  55 tensors",
        "names",
    ]
    # What is alike in all layers takes one line.
    assert [line.split() for line in lines if "up_proj" in line] == [
        ["model.layers.{0-3}.mlp.up_proj.weight", "[12,", "8]", "float32"]
    ]
    assert len(lines) == 9 + 3 + 13


def test_digests_are_of_the_values_in_either_format(hf: Path, megatron: Path) -> None:
    reports = [inspect_checkpoint(folder, sha256=True) for folder in (hf, megatron)]
    digests = [{tensor.name: tensor.sha256 for tensor in report.tensors} for report in reports]
    with (hf / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        position = file.tell()
        name = "model.layers.3.self_attn.k_proj.weight"
        start, stop = header[name]["data_offsets"]
        file.seek(position + start)
        assert digests[0][name] == hashlib.sha256(file.read(stop - start)).hexdigest()
    assert digests[0] == digests[1]
    assert len(set(digests[0].values())) == 55


def test_report_of_a_torch_dist_folder(megatron: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, megatron, "--json")
    report = json.loads(text)
    assert code == 0 and report["problems"] == []
    assert report["format"] == "Megatron-core, torch_dist"
    assert (report["tensor_parallel"], report["stored_vocabulary"]) == (2, 256)
    assert report["spec"]["architecture"] == "pangu" and report["spec"]["vocab_size"] == 200
    assert report["num_bytes"] == 4 * report["num_parameters"]
    assert report["optimizer_state"] is False
    holds = {file["name"]: file["holds"] for file in report["files"]}
    assert holds == {
        "__0_0.distcp": "layers 0-1, embedding",
        "__1_0.distcp": "layers 0-1, embedding",
        "__2_0.distcp": "layers 2-3, final norm, LM head",
        "__3_0.distcp": "layers 2-3, LM head",
    }
    assert report["manifest"]["direction"] == "hf_to_megatron"
    assert "tensors" not in report["manifest"]
    code, text = run(capsys, megatron)
    assert "vocabulary       200, stored as 256 rows" in text
    assert "tensor parallel  2\n" in text


def test_the_parent_folder_of_megatron_lm(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = tmp_path / "run"
    shutil.copytree(megatron, parent / "iter_0000020")
    (parent / "latest_checkpointed_iteration.txt").write_text("20\n")
    code, text = run(capsys, parent)
    assert code == 0 and text.startswith(f"{parent / 'iter_0000020'}: Megatron-core, torch_dist")
    (parent / "latest_checkpointed_iteration.txt").write_text("30")
    code, text = run(capsys, parent)
    assert code == 2 and "names iter_0000030, which" in text
    (parent / "latest_checkpointed_iteration.txt").write_text("../secret")
    code, text = run(capsys, parent)
    assert code == 2 and "it must hold a number or 'release'" in text


def test_without_a_config_stored_keys_are_shown(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(broken / "hf")
    code, text = run(capsys, broken)
    assert code == 0
    assert "vocabulary       256 rows with padding" in text
    assert "note: no hf/config.json: what the model needs is not known" in text
    assert "decoder.layers.mlp.linear_fc1.weight" in text


def test_broken_files_of_torch_dist(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken / "__3_0.distcp"
    path.write_bytes(path.read_bytes()[:1000])
    (broken / "__0_0.distcp").unlink()
    code, text = run(capsys, broken)
    assert code == 1
    told = [line for line in text.splitlines() if line.startswith("broken: ")]
    assert sum(f"{path}: has 1,000 bytes" in line for line in told) == 1
    assert sum(f"{broken / '__0_0.distcp'}: is missing" in line for line in told) == 1
    # What is there is still listed.
    assert "  __1_0.distcp" in text and "decoder.layers.mlp.linear_fc1.weight" in text


def test_a_metadata_pickle_that_wants_to_run_code(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = broken / "trace"
    code_pickle = b"cos\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR."
    (broken / ".metadata").write_bytes(code_pickle)
    code, text = run(capsys, broken)
    assert code == 1 and "broken: " in text
    assert not trace.exists()


def test_digests_are_compared_with_the_manifests(
    hf: Path, megatron: Path, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {tensor.name: tensor for tensor in inspect_checkpoint(megatron, sha256=True).tensors}
    entries = {name: {"sha256": tensor.sha256} for name, tensor in tensors.items()}
    (broken / "conversion.json").write_text(json.dumps({"tensors": entries}))
    assert "note: 55 digests are those of conversion.json" in run(capsys, broken, "--sha256")[1]
    path = broken / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    embedding = load_file(hf / "model.safetensors")["model.embed_tokens.weight"]
    content[content.index(embedding[0].numpy().tobytes())] ^= 1  # a bit of its first value
    path.write_bytes(content)
    code, text = run(capsys, broken, "--sha256")
    assert code == 1
    assert text.splitlines()[-1].endswith("states other digests for model.embed_tokens.weight")
    assert run(capsys, broken)[0] == 0  # which reading the values alone tells


def test_a_broken_manifest(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (broken / "conversion.json").write_text('{"direction": "hf_to')
    code, text = run(capsys, broken)
    assert code == 1 and "conversion.json: is not a manifest" in text


def test_a_manifest_that_is_nested_too_deeply(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (broken / "conversion.json").write_text("[" * 200_000)
    code, text = run(capsys, broken)
    assert code == 1 and "conversion.json: is not a manifest" in text


def test_a_manifest_with_a_path_that_is_no_unicode(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (broken / "conversion.json").write_text(json.dumps({"source": "/models/\udcff"}))
    code, text = run(capsys, broken)
    assert code == 0 and "conversion.json  source /models/\\udcff" in text


def test_digests_of_a_broken_blob_are_left_out(
    hf: Path, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TorchDistReader(broken) as reader:
        chunk = reader.tensors["decoder.final_layernorm.weight"].chunks[0]
    path = broken / chunk.file
    content = bytearray(path.read_bytes())
    content[chunk.position : chunk.position + chunk.length] = bytes(chunk.length)
    path.write_bytes(content)
    code, text = run(capsys, broken, "--sha256", "--json")
    report = json.loads(text)
    assert code == 1
    (problem,) = report["problems"]
    assert problem.startswith(f"model.norm.weight: cannot be read ({path}: the part of tensor")
    whole = {tensor.name: tensor.sha256 for tensor in inspect_checkpoint(hf, sha256=True).tensors}
    found = {tensor["name"]: tensor["sha256"] for tensor in report["tensors"]}
    assert found == whole | {"model.norm.weight": None}


def test_another_programs_metadata_json(hf: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hf, tmp_path / "edited"))
    (folder / "metadata.json").write_text('{"author": "someone"}')
    report = inspect_checkpoint(folder)
    assert report.format == "Hugging Face, safetensors" and report.problems == []


def test_a_reader_that_stops_early_is_no_error(hf: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    script = inspect_checkpoint_tool.__file__
    child = subprocess.run(
        [sys.executable, script, str(hf)], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (child.returncode, child.stderr) == (0, b"")


def test_missing_extra_and_misshapen_tensors(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "edited"
    tensors = make_hf(folder)
    del tensors["model.layers.2.self_attn.o_proj.bias"]
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(12)
    tensors["model.norm.weight"] = torch.zeros(7)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(1)
    write_tensors(folder, tensors)
    code, text = run(capsys, folder)
    assert code == 1
    assert text.splitlines()[-4:] == [
        "note: 1 tensors are computed, not learned (model.layers.1.self_attn.rotary_emb.inv_freq)",
        "broken: missing: model.layers.2.self_attn.o_proj.bias",
        "broken: not used by this model: model.layers.0.mlp.up_proj.bias",
        "broken: wrong shape: model.norm.weight [7], expected [8]",
    ]


def test_every_broken_shard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sharded"
    tensors = make_hf(folder, num_files=3)
    for number in (1, 3):
        path = folder / f"model-{number:05d}-of-00003.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    code, text = run(capsys, folder)
    assert code == 1
    told = [line for line in text.splitlines() if line.startswith("broken: ")]
    assert sum("is not a whole safetensors file" in line for line in told) == 2
    assert "model-00002-of-00003.safetensors  " in text and "18 tensors" in text
    missing = next(line for line in told if line.startswith("broken: missing: "))
    assert len(missing.split(", ")) == len(tensors) - 18


def test_an_unknown_architecture_and_a_lying_dtype(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(hf, tmp_path / "edited"))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"dtype": "bfloat16"}))
    (folder / "optimizer.pt").write_bytes(b"")
    code, text = run(capsys, folder)
    assert code == 0
    assert "note: config.json says bfloat16; tensors are float32" in text
    assert "optimizer state  present" in text
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    code, text = run(capsys, folder)
    assert code == 1
    assert "model_type = 'mamba': must be one of" in text
    assert "tensors          55" in text


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, tmp_path / "nowhere")
    assert code == 2 and text.startswith("error: checkpoint") and "does not exist" in text
    code, text = run(capsys, tmp_path)
    assert code == 2 and "holds neither" in text
