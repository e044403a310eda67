"""The states of a process's global random generators on the host, as values that JSON can hold."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np


class HostRandom:
    """Python's and numpy's global generators, as a part of a run that has a state."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        version, python_state, python_gauss = random.getstate()
        algorithm, keys, position, has_gauss, gauss = cast("Any", np.random.get_state())
        return {
            "python": [version, list(python_state), python_gauss],
            "numpy": [algorithm, keys.tolist(), position, has_gauss, gauss],
        }

    def load_state_dict(self, state: Any) -> None:
        """Set what `state_dict` returned.

        Raises:
            ValueError: it is not that.
        """
        try:
            version, python_state, python_gauss = state["python"]
            algorithm, keys, position, has_gauss, gauss = state["numpy"]
            random.setstate((version, tuple(python_state), python_gauss))
            np.random.set_state((algorithm, np.array(keys, np.uint32), position, has_gauss, gauss))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"the state of the random generators is broken ({error!r})") from error
