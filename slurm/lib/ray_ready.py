"""Wait until all nodes of a job have joined its Ray, which is asked itself."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

POLL_SECONDS = 0.5


def main() -> int:
    """0: all have joined; 1: not in time, or a process that keeps one of them has ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True, help="host:port of Ray's head")
    parser.add_argument("--nodes", type=int, required=True, help="how many must have joined")
    parser.add_argument("--seconds", type=float, required=True, help="deadline")
    parser.add_argument(
        "--watch", type=int, nargs="*", default=[], help="process ids; one that ends is a failure"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    deadline = time.monotonic() + options.seconds
    joined: set[str] = set()
    while time.monotonic() < deadline:
        if gone := [pid for pid in options.watch if not _is_alive(pid)]:
            print(f"{len(gone)} of the nodes' steps ended before all had joined", file=sys.stderr)
            return 1
        joined = _joined(options.address)
        if len(joined) >= options.nodes:
            print(f"joined: {', '.join(sorted(joined))}")
            return 0
        time.sleep(POLL_SECONDS)
    names = ", ".join(sorted(joined)) or "none"
    print(
        f"{len(joined)} of {options.nodes} nodes joined in {options.seconds:g} s: {names}",
        file=sys.stderr,
    )
    return 1


def _joined(address: str) -> set[str]:
    """Names of the nodes that Ray's head counts as alive; none while it does not answer."""
    from ray._raylet import GcsClient

    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=5)
    except Exception:  # a server that is only starting fails in many ways
        return set()
    return {node.node_name for node in nodes.values() if node.state == 0}  # GcsNodeInfo.ALIVE


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
