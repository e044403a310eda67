"""What an export reads of a run's folder and of its reference, and what it compares."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r2vpo_megatron.conversion import to_hf as to_hf_module
from r2vpo_megatron.conversion.carry_out import carry_out
from r2vpo_megatron.conversion.hf_export import HfExport, OpenedExport
from r2vpo_megatron.conversion.progress import ConversionProgress
from r2vpo_megatron.conversion.to_hf import conversion_to_hf, plan_to_hf
from r2vpo_megatron.models.spec import read_model_spec
from tests.conversion_runs import same, tensors_of, to_hf, to_megatron
from tests.random_checkpoints import make_hf_folder, save_tensors
from tests.torch_dist_files import Form, write_megatron

LATEST = "latest_checkpointed_iteration.txt"


def test_a_run_that_saves_meanwhile_does_not_change_what_is_exported(tmp_path: Path) -> None:
    """Iteration 2, saved between planning and copying, has other values in the same shapes."""
    hf, run = tmp_path / "hf", tmp_path / "run"
    first = make_hf_folder(hf)
    spec = read_model_spec(hf)
    second = {name: tensor + 1 for name, tensor in first.items()}
    for iteration, tensors in ((1, first), (2, second)):
        write_megatron(run / f"iter_{iteration:07d}", tensors, spec)
    (run / LATEST).write_text("1")
    export = HfExport(run, tmp_path / "back", hf_reference=hf)
    plan = plan_to_hf(export)
    (run / LATEST).write_text("2")
    conversion = conversion_to_hf(export, plan, verify=True, logits=False)
    carry_out(conversion, resume=False, progress=ConversionProgress())
    back = tensors_of(tmp_path / "back")
    assert all(same(back[name], first[name]) for name in first)
    assert conversion.job["source"] == str((run / "iter_0000001").resolve())
    assert HfExport(run, tmp_path / "other").checkpoint == run / "iter_0000002"


def test_a_run_with_optimizer_state_is_read(tmp_path: Path) -> None:
    """As DistributedDataParallel and the distributed optimizer save it, with padding and TP 2."""
    hf, run = tmp_path / "hf", tmp_path / "run"
    source = make_hf_folder(hf, dtype=torch.bfloat16)
    spec = read_model_spec(hf)
    moments = torch.full((256, 24), 7.0)
    optimizer = {
        f"optimizer.state.{state}.{key}": moments.clone()
        for state in ("exp_avg", "exp_avg_sq", "fp32_param")
        for key in ("module.embedding.word_embeddings.weight", "output_layer.weight")
    }
    form = Form(tensor=2, pipeline=2, prefix="module.")
    write_megatron(run / "iter_0000012", source, spec, form, extra=optimizer)
    (run / LATEST).write_text("12")
    to_hf(HfExport(run, tmp_path / "back", hf_reference=hf), verify=True)
    back = tensors_of(tmp_path / "back")
    assert back.keys() == source.keys()
    assert all(same(back[name], source[name]) for name in source)


def test_an_index_without_its_files_is_a_config_alone(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    source = make_hf_folder(hf, num_files=2)
    to_megatron(hf, tmp_path / "m")
    reference = tmp_path / "reference"
    shutil.copytree(hf, reference, ignore=shutil.ignore_patterns("*.safetensors"))
    assert (reference / "model.safetensors.index.json").is_file()
    to_hf(HfExport(tmp_path / "m", tmp_path / "back", hf_reference=reference), verify=True)
    back = tensors_of(tmp_path / "back")
    assert back.keys() == {name for name in source if not name.endswith("inv_freq")}
    assert all(same(back[name], source[name]) for name in back)
    # With a part of its files it is a broken one.
    shutil.copy(hf / "model-00001-of-00002.safetensors", reference)
    with pytest.raises(ValueError, match="model-00002-of-00002"):
        plan_to_hf(HfExport(tmp_path / "m", tmp_path / "other", hf_reference=reference))


def spoilt(name: str) -> Callable[..., Tensor]:
    """OpenedExport.rows, which makes a mistake in one tensor."""
    rows = OpenedExport.rows

    def with_mistake(self: OpenedExport, entry: Any, start: int, stop: int) -> Tensor:
        tensor = rows(self, entry, start, stop)
        if entry.name == name:
            tensor = tensor.clone()
            tensor[-1] += 1
        return tensor

    return with_mistake


@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.rotary_emb.inv_freq", "lm_head.weight", "model.norm.weight"]
)
def test_what_the_reference_restores_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hf, megatron = tmp_path / "hf", tmp_path / "m"
    tensors = make_hf_folder(hf, tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_tensors(hf, tensors)
    to_megatron(hf, megatron)
    export = HfExport(megatron, tmp_path / "back", hf_reference=hf, dtype="bfloat16")
    found = to_hf(export, verify=True)
    assert found.startswith(f"verified: {len(tensors)} tensors, ")
    manifest = json.loads((tmp_path / "back" / "conversion.json").read_text())
    assert manifest["tensors"][name].keys() >= {"shape", "dtype", "sha256"}
    monkeypatch.setattr(OpenedExport, "rows", spoilt(name))
    other = HfExport(megatron, tmp_path / "other", hf_reference=hf, dtype="bfloat16")
    with pytest.raises(ValueError, match=f"{name} differs first at"):
        to_hf(other, verify=True)
    assert not (tmp_path / "other").exists()


def test_files_are_read_as_utf8_whatever_the_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hf_folder(tmp_path / "hf", author="盘古")
    to_megatron(tmp_path / "hf", tmp_path / "m")
    read_text = Path.read_text

    def as_ascii(self: Path, encoding: str | None = None, errors: str | None = None) -> str:
        return read_text(self, encoding or "ascii", errors)

    config = tmp_path / "m" / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), ensure_ascii=False), "utf-8")
    monkeypatch.setattr(to_hf_module.Path, "read_text", as_ascii)
    plan = plan_to_hf(HfExport(tmp_path / "m", tmp_path / "back", as_llama=True))
    assert plan.notes[0].startswith("config.json will be a Llama's")


def test_the_plan_names_what_is_not_copied_and_counts_the_wider_dtype(tmp_path: Path) -> None:
    make_hf_folder(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "m")
    (tmp_path / "hf" / "figures").mkdir()
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"")
    export = HfExport(tmp_path / "m", tmp_path / "back", hf_reference=tmp_path / "hf")
    plan = plan_to_hf(export)
    assert plan.notes[-1] == "not copied: figures/, pytorch_model.bin"
    narrow = plan_to_hf(HfExport(tmp_path / "m", tmp_path / "back", dtype="bfloat16"))
    assert narrow.source_item_bytes == 4
