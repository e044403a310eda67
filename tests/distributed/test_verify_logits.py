"""Logits of a converted checkpoint, live in Megatron, are transformers'; where not, it shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r2vpo_megatron.conversion.carry_out import carry_out
from r2vpo_megatron.conversion.hf_export import HfExport
from r2vpo_megatron.conversion.logits_check import NUM_TOKENS, compare_logits
from r2vpo_megatron.conversion.progress import ConversionProgress
from r2vpo_megatron.conversion.to_hf import conversion_to_hf, plan_to_hf
from r2vpo_megatron.conversion.verify import LOGITS_TOLERANCE, LogitsCheck, verify_conversion
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_checkpoints import VARIANTS, save_checkpoint
from tools import convert_hf_to_megatron


def convert(hf: Path, output: Path, *options: str) -> Path:
    arguments = ["--hf", str(hf), "--output", str(output), *options]
    assert convert_hf_to_megatron.main(arguments) == 0
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(Hugging Face, torch_dist) of each variant, split over ranks in different ways."""
    folders = {}
    for number, variant in enumerate(VARIANTS):
        root = tmp_path_factory.mktemp(variant)
        save_checkpoint(variant, root / "hf")
        layout = ["--tensor-parallel", str(1 + number % 2), "--pipeline-parallel", "2"]
        folders[variant] = (root / "hf", convert(root / "hf", root / "megatron", *layout))
    return folders


def _compare(
    rank: int, world_size: int, init_method: str, folders: dict[str, tuple[Path, Path]]
) -> dict[str, LogitsCheck]:
    return {name: compare_logits(*pair) for name, pair in folders.items()}


def test_logits_of_every_architecture(folders: dict[str, tuple[Path, Path]]) -> None:
    (checks,) = run_ranks(1, _compare, folders)
    assert list(checks) == VARIANTS
    for variant, check in checks.items():
        assert check.largest_logit > 0.5, variant
        assert check.relative_difference < LOGITS_TOLERANCE / 10, (variant, check)


def test_exchanged_gate_and_up_show(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    hf, megatron = folders["pangu-untied"]
    edited = Path(shutil.copytree(hf, tmp_path / "edited"))
    tensors = load_file(hf / "model.safetensors")
    gate, up = (f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    save_file(tensors, edited / "model.safetensors", metadata={"format": "pt"})
    (checks,) = run_ranks(1, _compare, {"edited": (edited, megatron)})
    assert checks["edited"].relative_difference > 10 * LOGITS_TOLERANCE


@pytest.mark.parametrize("companions", ["reference", "beside the iteration"])
def test_a_training_checkpoint_without_config(
    companions: str, folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, megatron = folders["pangu-untied"]
    run = tmp_path / "run"
    shutil.copytree(megatron, run / "iter_0000007", ignore=shutil.ignore_patterns("hf"))
    (run / "latest_checkpointed_iteration.txt").write_text("7")
    if companions == "reference":
        export = HfExport(run, tmp_path / "back", hf_reference=hf)
    else:
        shutil.copytree(megatron / "hf", run / "hf")
        export = HfExport(run, tmp_path / "back")
    conversion = conversion_to_hf(export, plan_to_hf(export), verify=True)  # small: with logits
    found = carry_out(conversion, resume=False, progress=ConversionProgress())
    assert f"logits of {NUM_TOKENS} tokens within" in found


def test_a_cast_conversion_is_verified_in_a_child(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, _ = folders["pangu-tied"]
    megatron = convert(hf, tmp_path / "megatron", "--dtype", "bfloat16")
    verification = verify_conversion(hf, megatron, dtype=torch.bfloat16)  # small: compares logits
    assert verification.logits is not None
    assert verification.logits.relative_difference < LOGITS_TOLERANCE / 10
    with pytest.raises(ValueError, match="has dtype bfloat16"):
        verify_conversion(hf, megatron, logits=False)


def test_a_wrong_config_shows_in_the_child(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, megatron = folders["llama-untied"]
    edited = Path(shutil.copytree(hf, tmp_path / "edited"))
    config = json.loads((edited / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10.0
    (edited / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="of the largest; 1e-04 is allowed"):
        verify_conversion(megatron, edited)
