"""The Ray that a run starts: who can reach it and who is let in."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import ray

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.orchestration.cluster import free_tcp_address, ray_session

CONFIG = RunConfig()
CLIENT = """
import sys
from dataclasses import replace
from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.orchestration.cluster import ray_session
config = RunConfig()
config = replace(config, runtime=replace(config.runtime, ray_address=sys.argv[1]))
with ray_session(config, {"CPU": 1}):
    print("let in")
"""


@ray.remote(num_cpus=0)
class Member:
    """Of a gloo group, as a learner's rank."""

    def address(self) -> str:
        return free_tcp_address()

    def sum_over(self, address: str, rank: int) -> tuple[int, float]:
        """This process's id, and the sum over the group of 1 + rank."""
        import torch
        import torch.distributed as dist

        dist.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60)
        )
        value = torch.tensor([1.0 + rank])
        dist.all_reduce(value)
        return os.getpid(), value.item()


@dataclass(frozen=True)
class Seen:
    """What was found while the session lasted."""

    address: str
    token_mode: int
    listening: frozenset[tuple[str, int]]
    sums: tuple[float, ...]
    clients: dict[str, subprocess.CompletedProcess[str]]


def _listening() -> frozenset[tuple[str, int]]:
    """Addresses and ports on which this process and its descendants listen."""
    process = psutil.Process()
    connections = [
        connection
        for member in [process, *process.children(recursive=True)]
        for connection in member.net_connections(kind="inet")
    ]
    return frozenset(
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
    )


def _environment() -> dict[str, str]:
    """The variables that a session sets."""
    kept = ("RAY_AUTH", "RAY_ENABLE", "GLOO", "VLLM_HOST")
    return {name: value for name, value in os.environ.items() if name.startswith(kept)}


def _client(address: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if "RAY_AUTH" not in name}
    return subprocess.run(
        [sys.executable, "-c", CLIENT, address],
        env=environment | {"HOME": str(home)} | variables,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    before = _environment()
    home = tmp_path_factory.mktemp("home")
    with ray_session(CONFIG, {"CPU": 2}):
        members = [Member.remote(), Member.remote()]
        rendezvous = ray.get(members[0].address.remote())
        results = ray.get(
            [member.sum_over.remote(rendezvous, rank) for rank, member in enumerate(members)]
        )
        # torch's store has no way to choose an interface (docs/security.md).
        store = int(rendezvous.rpartition(":")[2])
        address = ray.get_runtime_context().gcs_address
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        yield Seen(
            address,
            stat.S_IMODE(token.stat().st_mode),
            frozenset(item for item in _listening() if item[1] != store),
            tuple(value for _, value in results),
            {
                "none": _client(address, home),
                "wrong": _client(address, home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64),
                "right": _client(
                    address, home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)
                ),
            },
        )
    assert not token.exists()
    assert _environment() == before


@pytest.mark.slow
def test_no_port_is_open_beyond_loopback(seen):
    assert len(seen.listening) >= 5  # at least the store of states, the node's daemon, two actors
    assert {address for address, _ in seen.listening} == {"127.0.0.1"}
    assert not any(port == 8265 for _, port in seen.listening)  # the dashboard's


@pytest.mark.slow
def test_ranks_meet_on_loopback(seen):
    assert seen.sums == (3.0, 3.0)


@pytest.mark.slow
def test_only_the_token_of_the_run_opens_it(seen):
    assert seen.token_mode == 0o600
    for name in ("none", "wrong"):
        assert seen.clients[name].returncode != 0
        assert "let in" not in seen.clients[name].stdout
        assert f"runtime.ray_address = '{seen.address}'" in seen.clients[name].stderr
        assert "RAY_AUTH_TOKEN_PATH" in seen.clients[name].stderr
    assert seen.clients["right"].stdout.strip() == "let in"
