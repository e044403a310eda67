"""Who may reach a run's Ray: whoever can submit a task to it runs code as its user."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

_raylet: Any = ray._raylet  # compiled: its type hints leave out what is used here

LOOPBACK = "127.0.0.1"
USER_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextlib.contextmanager
def private_environment() -> Iterator[None]:
    """In the block, a Ray that this process starts answers on loopback, and to one token only.

    Daemons, actors and their libraries inherit it: the token by a file that its owner alone can
    read, gloo's and vLLM's interface by name. A token that the user has set is kept. The
    environment is put back at the end.
    """
    with contextlib.ExitStack() as stack:
        changes = {
            "RAY_AUTH_MODE": "token",
            ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",  # as below, for Ray's daemons
            "VLLM_HOST_IP": LOOPBACK,
        }
        if sys.platform == "linux":
            changes["GLOO_SOCKET_IFNAME"] = "lo"
        if not any(os.environ.get(name) for name in USER_TOKEN_VARIABLES):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="r2vpo-ray-")))
            changes["RAY_AUTH_TOKEN_PATH"] = str(_write_token(folder / "token"))
        before = {name: os.environ.get(name) for name in changes}
        stack.callback(_reload_authentication)
        stack.callback(_restore, before)
        os.environ.update(changes)
        _reload_authentication()
        stack.enter_context(_loopback_only())
        yield


def _write_token(path: Path) -> Path:
    """Make the file with a new random token, readable by its owner from the first moment on."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _reload_authentication() -> None:
    """Have Ray read mode and token again; it keeps both from the first time on.

    Ray's own ray/_private/authentication/authentication_token_setup.py does the same.
    """
    _raylet.Config.initialize("")
    _raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Bind all ports of a Ray that is started in the block to 127.0.0.1.

    Ray 2.60 replaces _node_ip_address="127.0.0.1" by the address of the network
    (ray/_private/services.py, resolve_ip_for_localhost), and for any other it binds to all
    interfaces. Loopback alone is what it does where clusters are switched off, its default on
    macOS and Windows; the switch is read when Ray is imported. Goes when ray.init takes loopback.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def warn_if_open() -> None:
    """Print a warning where the cluster that was joined asks for no token and is on a network."""
    host = ray.get_runtime_context().gcs_address.rpartition(":")[0]
    has_token = _raylet.get_authentication_mode() == _raylet.AuthenticationMode.TOKEN
    if has_token or _is_loopback(host):
        return
    print(
        f"warning: the Ray cluster at {host} has no authentication: whoever can reach it can run "
        "code as its user; start it with RAY_AUTH_MODE=token (docs/security.md)",
        file=sys.stderr,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
