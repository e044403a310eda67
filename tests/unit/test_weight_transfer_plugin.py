"""The vLLM plug-in against both of vLLM's signatures, with fakes of its modules."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from r2vpo_megatron.rollout.weight_transfer import register_weight_transfer
from r2vpo_megatron.rollout.weight_updates import WeightTransferInterrupted
from r2vpo_megatron.rollout.worker_extension import WeightPushExtension

MODULE = "r2vpo_megatron.rollout.weight_transfer_engine"
PARALLEL = types.SimpleNamespace(rank=1)


@dataclasses.dataclass
class Info:
    pass


class Engine023:
    def __init__(self, config: Any, parallel_config: Any, model: Any) -> None:
        self.config, self.parallel_config = config, parallel_config


class Engine032:
    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        self.config, self.parallel_config = config, vllm_config.parallel_config
        self.device, self.model = device, model

    def parse_update_info(self, info: dict[str, Any]) -> Any:
        return self.update_info_cls(**info)  # type: ignore[attr-defined]


class Factory:
    """vLLM's, which refuses a name that it has."""

    def __init__(self) -> None:
        self._registry: dict[str, tuple[str, str]] = {}

    def register_engine(self, name: str, module: str, class_name: str) -> None:
        if name in self._registry:
            raise ValueError(f"Weight transfer engine '{name}' is already registered.")
        self._registry[name] = (module, class_name)


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    base = types.SimpleNamespace(WeightTransferInitInfo=Info, WeightTransferUpdateInfo=Info)
    factory = types.SimpleNamespace(WeightTransferEngineFactory=Factory())
    package = "vllm.distributed.weight_transfer"
    for name in ("vllm", "vllm.distributed", package):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, f"{package}.base", base)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, f"{package}.factory", factory)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield types.SimpleNamespace(base=base, factory=factory.WeightTransferEngineFactory)
    sys.modules.pop(MODULE, None)


class Model:
    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, tensors: Any) -> None:
        self.loaded |= dict(tensors)


class Bucket:
    def __init__(self, breaks: bool = False) -> None:
        self._breaks = breaks

    def open(self, link: Any, stage_seconds: dict[str, float]) -> dict[str, torch.Tensor]:
        if self._breaks:
            raise WeightTransferInterrupted("peer is gone")
        stage_seconds |= {"receive": 1.0, "verify": 2.0}
        return {"w": torch.ones(2)}


class Connection:
    def __init__(self, breaks: bool = False) -> None:
        self._breaks = breaks
        self.log: list[object] = []

    def join(self, rank: int) -> Any:
        if self._breaks:
            raise WeightTransferInterrupted("nobody came")
        self.log.append(rank)
        return types.SimpleNamespace(close=lambda: self.log.append("close"))


def make_engine(fake_vllm: Any, version: str) -> tuple[Any, Any, Model]:
    fake_vllm.base.WeightTransferEngine = Engine023 if version == "0.23" else Engine032
    module = importlib.import_module(MODULE)
    model = Model()
    vllm_config = types.SimpleNamespace(parallel_config=PARALLEL)
    arguments = (
        (PARALLEL, model) if version == "0.23" else (vllm_config, torch.device("cpu"), model)
    )
    return module, module.BucketWeightTransferEngine(object(), *arguments), model


@pytest.mark.parametrize("version", ["0.23", "0.32"])
def test_both_signatures_load_a_bucket_and_report_the_stages(fake_vllm: Any, version: str) -> None:
    module, engine, model = make_engine(fake_vllm, version)
    if version == "0.23":  # the worker hands over what loads
        given: dict[str, torch.Tensor] = {}
        engine.receive_weights(module.BucketInfo(Bucket()), load_weights=given.update)
        assert model.loaded == {}
    else:
        engine.update_weights({"bucket": Bucket()})
        given = model.loaded
    assert given["w"].tolist() == [1.0, 1.0]
    report = engine.take_report()
    assert report.interruption is None
    assert report.seconds.pop("load") >= 0
    assert report.seconds == {"receive": 1.0, "verify": 2.0}
    assert engine.take_report().seconds == {}  # told once


@pytest.mark.parametrize("version", ["0.23", "0.32"])
def test_each_worker_joins_as_its_own_member_and_leaves_the_connection_of_before(
    fake_vllm: Any, version: str
) -> None:
    module, engine, _ = make_engine(fake_vllm, version)
    first, second = Connection(), Connection()
    engine.init_transfer_engine(module.JoinInfo(first, 3))
    engine.init_transfer_engine(module.JoinInfo(second, 5))
    assert first.log == [4, "close"] and second.log == [6]
    engine.shutdown()
    engine.shutdown()
    assert second.log == [6, "close"]


def test_a_broken_connection_is_told_and_nothing_is_loaded(fake_vllm: Any) -> None:
    module, engine, model = make_engine(fake_vllm, "0.32")
    engine.init_transfer_engine(module.JoinInfo(Connection(breaks=True), 1))
    assert engine.take_report().interruption == "nobody came"
    engine.update_weights({"bucket": Bucket(breaks=True)})
    assert engine.take_report().interruption == "peer is gone"
    assert model.loaded == {}


def test_the_plug_in_may_be_registered_any_number_of_times(fake_vllm: Any) -> None:
    register_weight_transfer()
    register_weight_transfer()
    assert fake_vllm.factory._registry == {"r2vpo": (MODULE, "BucketWeightTransferEngine")}


@pytest.mark.parametrize(
    ("version", "is_active", "expected"),
    [
        ("0.23", True, ["worker finishes"]),
        ("0.23", False, ["engine abandons"]),
        ("0.32", True, ["engine abandons"]),
    ],
)
def test_a_half_received_push_is_left_by_who_began_the_reload(
    fake_vllm: Any,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    is_active: bool,
    expected: list[str],
) -> None:
    config = types.ModuleType("vllm.config")
    config.set_current_vllm_config = lambda config: contextlib.nullcontext()  # type: ignore
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    log: list[str] = []
    _, engine, _ = make_engine(fake_vllm, version)
    engine.abandon = lambda: log.append("engine abandons")
    worker = WeightPushExtension()
    worker.vllm_config, worker.weight_transfer_engine = None, engine
    worker._weight_update_active = is_active
    worker.finish_weight_update = lambda: log.append("worker finishes")
    worker.abandon_weight_push()
    assert log == expected and worker._weight_update_active is False
