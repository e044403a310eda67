"""Every fault ends in a finished run, or in a clean end from which the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.faults import FAULTS, Scene, Untried


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str, tiny_model: Path, tmp_path: Path) -> None:
    scene = Scene(tiny_model, tmp_path)
    try:
        FAULTS[name][1](scene)
    except Untried as reason:
        pytest.skip(str(reason))
    finally:
        scene.clean_up()
