"""Installed versions against those that were pinned together."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from r2vpo_megatron.observability.provenance import PACKAGES

PIN_FILES = {"cpu": "cpu-lock.txt", "cuda": "cuda.txt", "npu": "npu.txt"}
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"


def read_pins(path: Path) -> list[Requirement]:
    """The packages of a requirements file that results depend on.

    Raises:
        OSError: it cannot be read.
    """
    watched = {canonicalize_name(name) for name in PACKAGES}
    pins = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            requirement = Requirement(line.partition("#")[0].strip())
        except InvalidRequirement:
            continue  # a comment, an option, or empty
        if canonicalize_name(requirement.name) in watched:
            pins.append(requirement)
    return pins


def installed_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed, by canonical name; nothing is imported."""
    versions: dict[str, str] = {}
    for name in names:
        try:
            versions[canonicalize_name(name)] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def compare_versions(pins: Sequence[Requirement], installed: dict[str, str]) -> list[str]:
    """What differs, a line each; empty where everything is as pinned."""
    lines = []
    for pin in pins:
        version = installed.get(canonicalize_name(pin.name))
        if version is None:
            lines.append(f"{pin.name} is missing ({pin.specifier})")
        elif not pin.specifier.contains(version, prereleases=True):
            lines.append(f"{pin.name} {version} ({pin.specifier})")
    return lines
