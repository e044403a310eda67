"""Read a pickle as data: nothing that it names is imported, called or even looked up.

Every object comes out as a `Record` of its class's name, its arguments and its state, every
class or function as a `Global`. Of the opcodes only those are known that a writer of plain data
emits; pickle's pure Python machine, unlike the C one, takes no memory for what a file merely
claims (a memo slot of number 4 billion, a bytearray of that length).
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

# Private in name, but what pickle itself falls back to where it has no C.
_PythonUnpickler: Any = pickle._Unpickler

# fmt: off
_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT,
    pickle.BINUNICODE, pickle.SHORT_BINUNICODE,
    pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET,
    pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID,
)
# fmt: on
# All that the machine raises on a stream that is not a pickle, or not one of plain data.
_FAULTS = (
    pickle.UnpicklingError,
    LookupError,
    EOFError,
    TypeError,
    AttributeError,
    ValueError,
    OverflowError,
    struct.error,
)


@dataclass(frozen=True)
class Global:
    """A class or function that the pickle names."""

    name: str  # with its module


@dataclass(eq=False, slots=True)  # compared and hashed by identity: it may be a dictionary's key
class Record:
    """An object that the pickle would have made."""

    name: str  # of its class, or of the function that would have made it; with the module
    arguments: Any = ()
    state: Any = None

    def field(self, name: str) -> Any:
        """A field of the state of a dataclass, None where it is not set.

        Raises:
            TypeError: the state is not that of a dataclass.
        """
        if not isinstance(self.state, dict):
            raise TypeError(f"{self.name} has no fields")
        return self.state.get(name)


def loads(data: bytes, known_globals: Collection[str]) -> Any:
    """Read a pickle.

    Args:
        data: of protocol 2 to 5.
        known_globals: names, with their modules, that may occur.

    Returns:
        str, int, float, bool, None, tuple, list, dict, Record and Global. A persistent id is a
        Record named "persistent" with the id as its arguments.

    Raises:
        ValueError: another name occurs, or the data are not a whole pickle of plain data.
    """
    try:
        return _Machine(data, known_globals).load()
    except _FAULTS as error:
        reason = str(error) if isinstance(error, pickle.UnpicklingError | ValueError) else ""
        raise ValueError(f"is not a pickle of plain data ({reason or repr(error)})") from error


class _Machine(_PythonUnpickler):  # type: ignore[misc]
    dispatch = {code[0]: _PythonUnpickler.dispatch[code[0]] for code in _OPCODES}  # noqa: RUF012

    def __init__(self, data: bytes, known_globals: Collection[str]) -> None:
        super().__init__(io.BytesIO(data))
        self._known_globals = known_globals

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in self._known_globals:
            raise pickle.UnpicklingError(f"it names {name!r}, which has no place here")
        return Global(name)

    def persistent_load(self, pid: Any) -> Any:
        return Record("persistent", pid)

    def _make(self) -> None:
        """For NEWOBJ and REDUCE: note a call instead of making it."""
        arguments = self.stack.pop()
        called = self.stack[-1]
        if not isinstance(called, Global):
            raise pickle.UnpicklingError("it calls what is not a class or function")
        self.stack[-1] = Record(called.name, arguments)

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise pickle.UnpicklingError("it gives a state to what is not an object")
        self.stack[-1].state = state

    def _set_item(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def _set(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise pickle.UnpicklingError("it sets items of what is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | Record):  # the hash of a deep tuple overflows C's
                raise pickle.UnpicklingError("a dictionary's key is neither text nor an object")
            target[key] = value

    dispatch[pickle.NEWOBJ[0]] = _make
    dispatch[pickle.REDUCE[0]] = _make
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items


def integers(value: Any, what: str) -> tuple[int, ...]:
    """Check that `value` is a tuple of sizes or offsets, also as a torch.Size.

    Raises:
        ValueError: it is not, or one is negative.
    """
    if isinstance(value, Record) and value.name == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list) or not all(type(number) is int for number in value):
        raise ValueError(f"{what}: must be integers")
    if any(number < 0 or number >= 2**63 for number in value):
        raise ValueError(f"{what}: must be in 0..2^63 - 1")
    return tuple(cast("list[int]", value))
