"""Nested state comes back as it went, to the bit."""

import json
import multiprocessing
import random
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r2vpo_megatron.checkpoint.host_random import HostRandom
from r2vpo_megatron.checkpoint.state_file import load_state, save_state

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
DTYPES = [np.dtype(name) for name in ("bool", *INTEGERS, "float16", "float32", "float64")]
# Floats by their bits: also negative zero and every NaN.
floats = st.binary(min_size=8, max_size=8).map(lambda bits: struct.unpack(">d", bits)[0])
arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(
        dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    )
)
leaves = st.none() | st.booleans() | st.integers() | floats | st.text() | arrays
marks = ("__array__", "__float__")  # refused as the only key
keys = st.text().filter(lambda key: key not in marks) | st.sampled_from(["a.b", "0", ""])
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
)


def described(value):
    """What two values share only if type and bits are the same."""
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items()}
    if isinstance(value, list):
        return [described(item) for item in value]
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, float):
        return ("float", struct.pack(">d", value))
    return (type(value).__name__, value)


@given(state=st.dictionaries(keys, values, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_state_comes_back_to_the_bit(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("state")
    save_state(folder, "part", state)
    assert described(load_state(folder, "part")) == described(state)


@pytest.mark.parametrize("bits", ["7ff8000000000001", "fff8000000000000", "8000000000000000"])
def test_a_float_keeps_its_sign_and_what_a_nan_carries(tmp_path, bits):
    save_state(tmp_path, "part", {"x": struct.unpack(">d", bytes.fromhex(bits))[0]})
    assert struct.pack(">d", load_state(tmp_path, "part")["x"]).hex() == bits


def test_a_generator_goes_on_where_it_was(tmp_path):
    generator = np.random.default_rng(3)
    generator.random(5)
    save_state(tmp_path, "rng", generator.bit_generator.state)
    expected = generator.random(4)
    other = np.random.default_rng(0)
    other.bit_generator.state = load_state(tmp_path, "rng")
    assert other.random(4).tobytes() == expected.tobytes()


def test_views_that_do_not_lie_in_order_are_stored_by_value(tmp_path):
    grid = np.arange(6, dtype=np.int32).reshape(2, 3)
    save_state(tmp_path, "part", {"turned": grid.T, "every_other": grid[0, ::2]})
    state = load_state(tmp_path, "part")
    assert state["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert state["every_other"].tolist() == [0, 2]


def test_what_was_loaded_can_be_written_to(tmp_path):
    save_state(tmp_path, "part", {"num_uses": np.zeros(2, dtype=np.int64)})
    num_uses = load_state(tmp_path, "part")["num_uses"]
    num_uses[1] += 7
    assert num_uses.tolist() == [0, 7]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((1, 2), r"part\.outer\[1\]\.inner: tuple"),
        (np.float32(1), r"part\.outer\[1\]\.inner: float32"),
        (np.array(["a"]), r"part\.outer\[1\]\.inner: ndarray"),
        (np.zeros(1, dtype=">f4"), r"part\.outer\[1\]\.inner: ndarray"),
        (np.zeros(1, dtype=np.longdouble), r"part\.outer\[1\]\.inner: ndarray"),
        ({1: "a"}, r"part\.outer\[1\]\.inner: the key 1"),
        ({"__array__": ["0", [1]]}, r"part\.outer\[1\]\.inner: dict"),
        ({"__float__": "0"}, r"part\.outer\[1\]\.inner: dict"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_its_path(tmp_path, value, message):
    with pytest.raises(TypeError, match=message):
        save_state(tmp_path, "part", {"outer": [0, {"inner": value}]})
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    save_state(tmp_path, "none", {})
    save_state(tmp_path, "some", {"x": np.ones(2)})
    (tmp_path / "none.safetensors").rename(tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match="array '0' is missing"):
        load_state(tmp_path, "some")


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_torn_file_is_refused(tmp_path, suffix):
    save_state(tmp_path, "part", {"x": np.ones(100)})
    path = tmp_path / f"part.{suffix}"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError):
        load_state(tmp_path, "part")


def test_json_has_no_word_that_json_does_not_know(tmp_path):
    save_state(tmp_path, "part", {"x": float("inf"), "y": float("nan")})

    def refuse(word):
        raise AssertionError(word)

    json.loads((tmp_path / "part.json").read_text(), parse_constant=refuse)


def save_with_little_room(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        save_state(folder, "part", {"x": np.zeros(1 << 16)})
    except OSError as error:
        assert "part.safetensors" in str(error)
        raise SystemExit(3) from None


def test_no_room_for_the_arrays_is_an_os_error(tmp_path):
    child = multiprocessing.get_context("fork").Process(
        target=save_with_little_room, args=(tmp_path,)
    )
    child.start()
    child.join()
    assert child.exitcode == 3


def test_the_drivers_generators_go_on_where_they_were() -> None:
    part = HostRandom()
    random.gauss(0, 1)  # half of a pair is kept
    np.random.standard_normal()
    state = json.loads(json.dumps(part.state_dict()))
    drawn = [random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand()]
    part.load_state_dict(state)
    assert drawn == [
        random.gauss(0, 1),
        random.random(),
        np.random.standard_normal(),
        np.random.rand(),
    ]
    for broken in ({}, state | {"python": [3, [1, 2], None]}, state | {"numpy": None}):
        with pytest.raises(ValueError, match="state of the random generators is broken"):
            part.load_state_dict(broken)
