"""What a run that goes on may differ in from the one that was saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2vpo_megatron.checkpoint.content_sample import add_content_sample

# Fields that change nothing of what has been computed, by section or by field.
FREE = (
    "checkpoint.",
    "data.held_out_prompts",
    "evaluation.",
    "guard.",
    "output.",
    "runtime.",
    "train.num_iterations",
    "rollout.slice_seconds",
    "rollout.hang_seconds",
    "rollout.max_restarts",
    "rollout.kv_cache_bytes",
    "rollout.memory_fraction",
)
# Fields under which sums are made in another order, or samples drawn by other kernels.
LAYOUT = (
    "parallel.",
    "weight_sync.",
    "optimizer.distributed",
    "rollout.num_engines",
    "rollout.tensor_parallel",
    "rollout.max_num_seqs",
    "rollout.threads_per_engine",
    "runtime.device",
)
# What names of samples, the place among the prompts and the buffer are made of.
FIXED = (
    "train_prompts",
    "train.seed",
    "train.prompts_per_iteration",
    "train.responses_per_prompt",
    "replay.capacity_iterations",
)
# Paths, which do not matter where what lies there is the same.
FINGERPRINTED = {
    "model.path": "model",
    "model.weights": "model",
    "data.train_prompts": "train_prompts",
}


@dataclass(frozen=True)
class Difference:
    """A field that the saved run had otherwise.

    Attributes:
        field: "section.name" of the configuration, or the name of a fingerprint.
        saved, current: its values; MISSING where there is none.
        kind: "free", "layout" or "other".
    """

    field: str
    saved: Any
    current: Any
    kind: str

    def __str__(self) -> str:
        """One line for a person."""
        if self.field in ("model", "tokenizer", "train_prompts"):
            return f"{self.field}: not what the saved run had (by its fingerprint)"
        return f"{self.field}: saved {self.saved!r}, now {self.current!r}"


MISSING = "(no such field)"


def find_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Difference]:
    """All fields in which two runs' facts differ.

    A field that one version of this project has and the other has not counts as different: what it
    did by default may not be what it does now.

    Args:
        saved: facts of a manifest: "config", nested by section, and "fingerprints".
        current: the same of this run.
    """
    found, same_prints = [], set()
    prints_before, prints_now = saved["fingerprints"], current["fingerprints"]
    for name in sorted(prints_before.keys() | prints_now.keys()):
        values = prints_before.get(name, MISSING), prints_now.get(name, MISSING)
        if values[0] == values[1]:
            same_prints.add(name)
        else:
            found.append(Difference(name, *values, "other"))
    before, now = _flatten(saved["config"]), _flatten(current["config"])
    for field in sorted(before.keys() | now.keys()):
        values = before.get(field, MISSING), now.get(field, MISSING)
        if values[0] != values[1] and FINGERPRINTED.get(field) not in same_prints:
            found.append(Difference(field, *values, _kind(field)))
    return found


def check_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], allowed: Collection[str]
) -> list[str]:
    """Lines on what is accepted.

    Args:
        saved, current: as for `find_differences`.
        allowed: names of fields and fingerprints that may differ, none of FIXED.

    Raises:
        ValueError: listing all that may not, and how to allow it; or a name in `allowed` that is
            none. A name that does not differ (any more) is no mistake: a run that is started again
            with the same words goes on from a checkpoint that has the change.
    """
    differences = find_differences(saved, current)
    known = {*_flatten(current["config"]), *current["fingerprints"]}
    if unknown := sorted(set(allowed) - known):
        raise ValueError(
            f"checkpoint.allow_changes names {', '.join(unknown)}; valid: fields of the "
            f"configuration as section.name, or {', '.join(current['fingerprints'])}"
        )
    others = [difference for difference in differences if difference.kind == "other"]
    fixed = [difference for difference in others if difference.field in FIXED]
    if fixed:
        listed = "\n".join(f"  {difference}" for difference in fixed)
        raise ValueError(
            f"this is not the run that was saved, and cannot go on from it:\n{listed}\n"
            "to train on with other values, begin a run from its weights (model.weights)"
        )
    refused = [difference for difference in others if difference.field not in allowed]
    if refused:
        listed = "\n".join(f"  {difference}" for difference in refused)
        names = ",".join(sorted({difference.field for difference in refused} | set(allowed)))
        raise ValueError(
            f"this is not the run that was saved:\n{listed}\n"
            f"to go on nevertheless (checkpoint.allow_changes): --checkpoint.allow-changes {names}"
        )
    layout = [difference for difference in differences if difference.kind == "layout"]
    lines = [f"changed, as allowed: {difference}" for difference in others]
    if layout:
        fields = "; ".join(str(difference) for difference in layout)
        lines.append(f"another layout, so what follows is not bit-exact: {fields}")
    return lines


def fingerprint_model(model_dir: Path, weights: str) -> str:
    """Hash of a model's configuration and weights, of which large files are sampled.

    Args:
        model_dir: Hugging Face folder.
        weights: `model.weights`: a folder that the weights come from instead, or "".
    """
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    folder = Path(weights) if weights else model_dir
    for path in sorted(folder.rglob("*")):  # Megatron's lie in a folder by iteration
        if path.suffix in (".safetensors", ".distcp") or path.name == ".metadata":
            digest.update(json.dumps(path.relative_to(folder).as_posix()).encode())
            add_content_sample(digest, path)
    return digest.hexdigest()


def fingerprint_tokenizer(model_dir: Path) -> str:
    """Hash of all files of a model folder that decide how text becomes tokens."""
    digest = hashlib.sha256()
    for path in sorted(model_dir.iterdir()):
        is_vocabulary = path.name in ("vocab.json", "merges.txt", "added_tokens.json")
        is_template = path.name in ("special_tokens_map.json", "chat_template.jinja")
        if is_vocabulary or is_template or path.name.startswith("tokenizer"):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(json.dumps([path.name, content]).encode())
    return digest.hexdigest()


def _kind(field: str) -> str:
    # `runtime.device` is more particular than `runtime.`.
    if any(_matches(field, pattern) for pattern in LAYOUT):
        return "layout"
    return "free" if any(_matches(field, pattern) for pattern in FREE) else "other"


def _matches(field: str, pattern: str) -> bool:
    return field.startswith(pattern) if pattern.endswith(".") else field == pattern


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by "section.name"."""
    return {
        f"{section}.{name}": value
        for section, fields in config.items()
        for name, value in fields.items()
    }
