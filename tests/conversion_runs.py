"""Conversions as tests run them, and what is compared of the folders that they make."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from r2vpo_megatron.conversion.carry_out import carry_out
from r2vpo_megatron.conversion.hf_export import HfExport
from r2vpo_megatron.conversion.megatron_pieces import ParallelLayout
from r2vpo_megatron.conversion.progress import ConversionProgress
from r2vpo_megatron.conversion.to_hf import conversion_to_hf, plan_to_hf
from r2vpo_megatron.conversion.to_megatron import (
    conversion_to_megatron,
    plan_to_megatron,
)

LAYOUTS = {1: "", 2: "1,3", 3: "1,2,1"}  # of 4 layers, by pipeline size


def to_megatron(
    source: Path,
    output: Path,
    layout: ParallelLayout | None = None,
    dtype: str = "keep",
    *,
    verify: bool = False,
    resume: bool = False,
) -> str:
    layout = layout or ParallelLayout()
    plan = plan_to_megatron(source, output, layout, dtype)
    conversion = conversion_to_megatron(plan, layout, verify=verify, logits=False)
    return carry_out(conversion, resume=resume, progress=ConversionProgress())


def to_hf(export: HfExport, *, verify: bool = False, resume: bool = False) -> str:
    conversion = conversion_to_hf(export, plan_to_hf(export), verify=verify, logits=False)
    return carry_out(conversion, resume=resume, progress=ConversionProgress())


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and first.equal(second)
