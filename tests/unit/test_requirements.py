"""The pinned environments and the images that install them fit the package and each other."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PINNED = {"cpu": "cpu-lock.txt", "cuda": "cuda.txt", "npu": "npu.txt"}
# npu.txt leaves it out: it is installed by itself, see there.
ALONE = {"npu": {"vllm": "0.23.0"}}


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    plain = (line.partition(" #")[0].strip() for line in lines)
    return [Requirement(line) for line in plain if line and line[0] not in "#-"]


def pins(platform: str) -> dict[str, str]:
    """Name -> version; every line of the file pins one package."""
    found: dict[str, str] = dict(ALONE.get(platform, {}))
    for requirement in requirements(PINNED[platform]):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and requirement.name not in found, requirement
        found[requirement.name] = specifier.version
    return found


def declared(platform: str) -> list[Requirement]:
    """What setup.cfg asks for on a platform, the extras that it names included."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = [
        setup["options"]["install_requires"],
        *(extras[e] for e in (platform, "report", "data")),
    ]
    names = [line for text in lines for line in text.splitlines() if line and line[0] != "#"]
    return [Requirement(name) for name in names if not name.startswith("r2vpo-megatron")]


@pytest.mark.parametrize("platform", PINNED)
def test_every_requirement_of_the_package_is_pinned_within_its_range(platform: str) -> None:
    found = pins(platform)
    for requirement in declared(platform):
        assert requirement.name in found, requirement
        assert requirement.specifier.contains(found[requirement.name]), requirement


@pytest.mark.parametrize("platform", PINNED)
def test_the_pins_are_those_asked_for(platform: str) -> None:
    found = pins(platform)
    for requirement in requirements(f"{platform}.in"):
        assert requirement.specifier.contains(found[requirement.name]), requirement
    overrides = f"{platform}-overrides.txt"
    for requirement in requirements(overrides) if platform != "cuda" else []:
        assert (requirement.name in found) == (requirement.marker is None), requirement


@pytest.mark.parametrize("platform", ["cuda", "npu"])
def test_an_image_is_made_of_what_is_there(platform: str) -> None:
    text = (ROOT / "docker" / f"{platform}.Dockerfile").read_text()
    instructions = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    arguments = {line.split()[1].split("=")[0] for line in instructions if line.startswith("ARG ")}
    used = set(re.findall(r"\$\{(\w+)\}", text))
    assert used == arguments and "FROM ${BASE_IMAGE}" in instructions
    copied = [line.split()[1] for line in instructions if line.startswith("COPY ")]
    assert copied == [f"requirements/{PINNED[platform]}", "."]
    assert (ROOT / copied[0]).is_file() and copied[0] in text.partition("-r ")[2]
    for name, version in re.findall(r" ([\w-]+)==([\w.]+)", " ".join(instructions)):
        assert pins(platform)[name] == version
    entrypoint = re.search(r'ENTRYPOINT \["/opt/r2vpo/(.*)"\]', text)
    if entrypoint is not None:
        assert os.access(ROOT / entrypoint[1], os.X_OK)


def test_the_images_entry_point_reads_canns_environment(tmp_path: Path) -> None:
    entrypoint = ROOT / "docker" / "npu-entrypoint.sh"
    script = tmp_path / "set_env.sh"
    script.write_text('export SEEN="$UNSET_BEFORE yes"\n')
    command = [entrypoint, "bash", "-c", 'printf "%s|%s" "$SEEN" "$1"', "name", "a b"]
    done = subprocess.run(
        command, env=os.environ | {"CANN_SET_ENV": str(script)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, " yes|a b")
    missing = os.environ | {"CANN_SET_ENV": str(tmp_path / "none")}
    if not Path("/usr/local/Ascend").exists():
        done = subprocess.run(command, env=missing, capture_output=True, text=True)
        assert done.returncode == 1 and "name it in CANN_SET_ENV" in done.stderr
