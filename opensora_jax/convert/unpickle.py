"""The pickles of PyTorch files, read by an interpreter that cannot call anything.

The standard library's `pickletools.genops` splits a pickle into opcodes without running them. The
interpreter here builds containers and plain values from those. The only functions it can call are
the ones handed to it; every other name in a pickle becomes an inert placeholder.
"""

import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any

from opensora_jax.files import short


class TorchFileError(ValueError):
    """A file of tensors that cannot be read, or that we refuse to read."""


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names as `module.name`; never imported."""

    name: str


class Placeholder:
    """An object of a class that is never imported, with all that the pickle says of it.

    Attributes:
      name: `module.name` of its class.
      args: arguments of its constructor.
      state: what it would restore itself from, mostly a dictionary of its attributes.
      items: what it holds, for a subclass of list or set.
      entries: what it holds, for a subclass of dict.
    """

    def __init__(self, name: str, args: Any):
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: list = []
        self.entries: dict = {}

    def __repr__(self) -> str:
        return f"Placeholder({self.name!r})"


# Opcodes that a pickle may have, and what else takes as much time or memory (objects with
# attributes, elements that are copied): so many, and one more for each 64 bytes of its file.
MOST_WORK = 250_000
BYTES_A_UNIT = 64
MOST_BITS = 256  # of an integer
LONGEST_KEY = 10_000  # characters
MOST_NAME = 1_000  # characters, of what is put together

# Plain values that a pickle can only spell as a call; none of these runs code of the file. What
# they copy, of something that a pickle may name again and again in two bytes, is counted.
CALLS: dict[str, Callable] = {
    "collections.OrderedDict": lambda pairs=(): OrderedDict(
        (_key(key), value) for key, value in _plain(pairs, list | tuple)
    ),
    "builtins.set": lambda items=(): set(map(_key, _plain(items, list | tuple))),
    "builtins.frozenset": lambda items=(): frozenset(map(_key, _plain(items, list | tuple))),
    "torch.Size": lambda size: tuple(_plain(size, list | tuple)),
    # How protocol 2, the one of torch.save, spells bytes.
    "_codecs.encode": lambda text, encoding: _plain(text, str).encode(_latin1(encoding)),
    # How classes without their own __reduce__ say "an object of this class".
    "copyreg._reconstructor": lambda cls, base, state: _new(cls, ()),
    "copyreg.__newobj__": lambda cls, *args: _new(cls, args),
}
# Protocols 0 to 2 name modules as Python 2 did.
PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def unpickle(
    data: bytes,
    calls: dict[str, Callable],
    persistent_load: Callable[[Any], Any],
    file_size: int | None = None,
) -> Any:
    """The object that the pickle `data`, of any protocol, describes.

    Args:
      data: the pickle.
      calls: `module.name` -> our function for it; with `CALLS` the only ones that are called.
      persistent_load: our function for a persistent id (PyTorch's: a storage).
      file_size: bytes of the file that it is in, by which its work is bounded; None: its own.

    Raises:
      TorchFileError: malformed, or a call of anything else, which the message names.
    """
    size = len(data) if file_size is None else file_size
    machine = _Machine({**CALLS, **calls}, persistent_load, MOST_WORK + size // BYTES_A_UNIT)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.charge(1)
            if opcode.name == "STOP":
                return machine.pop()
            if opcode.name not in _OPCODES:
                raise TorchFileError(f"pickle: refuses the opcode {opcode.name}")
            _OPCODES[opcode.name](machine, argument)
    except TorchFileError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {short(str(error))}"
        raise TorchFileError(f"malformed pickle ({reason})") from error
    raise TorchFileError("malformed pickle: it has no end")


_MARK = object()


class _Machine:
    """The stack machine of the pickle protocol, one method for each way to change its stack."""

    def __init__(
        self, calls: dict[str, Callable], persistent_load: Callable[[Any], Any], work: int
    ):
        self.calls, self.work = calls, work
        self.persistent_load = persistent_load
        self.stack: list = []
        self.memo: dict[int, Any] = {}

    def charge(self, units: int) -> None:
        self.work -= units
        if self.work < 0:
            raise TorchFileError("pickle: takes more time or memory than its file has reason to")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value is expected")
        return value

    def top(self) -> Any:
        self.push(self.pop())
        return self.stack[-1]

    def pop_many(self, n: int) -> list:
        return [self.pop() for _ in range(n)][::-1]

    def pop_to_mark(self) -> list:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def extend(self, values: list) -> None:
        target = self.top()
        if isinstance(target, Placeholder):
            target.items.extend(values)
        elif isinstance(target, set):
            target.update(_key(value) for value in values)
        else:
            _plain(target, list).extend(values)

    def set_items(self, values: list) -> None:
        target = self.top()
        target = target.entries if isinstance(target, Placeholder) else _plain(target, dict)
        target.update(_pairs(values))

    def call(self) -> None:
        function, args = self.pop_many(2)
        name = _plain(function, Global).name
        if name not in self.calls:
            raise TorchFileError(f"pickle: refuses to call {short(name)}")
        self.charge(4 + len(_plain(args, tuple)))
        for value in args[:2]:  # what is copied
            if isinstance(value, list | tuple):
                self.charge(len(value))
            elif isinstance(value, str):
                self.charge(len(value) // 32)
        self.push(self.calls[name](*args))

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, Placeholder):
            target.state = state
        else:
            # A state_dict is an OrderedDict with an attribute _metadata, which nobody needs.
            _plain(target, OrderedDict)


def _plain(value: Any, kind: type | UnionType) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} where {kind} is expected")
    return value


def _latin1(encoding: Any) -> str:
    # Python knows "encodings" that do other things, decompress for instance.
    if encoding != "latin1":
        raise ValueError("bytes are spelled in latin1")
    return encoding


def _key(value: Any) -> Any:
    """A key of a dictionary or member of a set: small and flat, so that hashing it is cheap."""
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > 8:
        raise ValueError(f"a tuple of {len(parts)} as a key")
    for part in parts:
        if isinstance(part, str | bytes) and len(part) > LONGEST_KEY:
            raise ValueError(f"a key of {len(part)} characters")
        if type(part) not in (str, int, float, bool, bytes, NoneType, Global):
            raise TypeError(f"{type(part).__name__} as a key")
        if isinstance(part, int) and part.bit_length() > 64:
            raise ValueError(f"a number of {part.bit_length()} bits as a key")
    return value


def _pairs(values: list) -> dict:
    if len(values) % 2:
        raise ValueError("a key without a value")
    return {_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def _global(module: Any, name: Any) -> Global:
    module = PYTHON_2_MODULES.get(_plain(module, str), module)
    if len(module) + len(_plain(name, str)) > MOST_NAME:
        raise TorchFileError(f"pickle: a name of {len(module) + len(name)} characters")
    return Global(f"{module}.{name}")


def _new(cls: Any, args: Any) -> Any:
    name = _plain(cls, Global).name
    return OrderedDict() if name == "collections.OrderedDict" else Placeholder(name, args)


def _push(machine: _Machine, argument: Any) -> None:
    if isinstance(argument, int) and argument.bit_length() > MOST_BITS:
        raise TorchFileError(f"pickle: an integer of {argument.bit_length()} bits")
    machine.push(argument)


def _new_object(machine: _Machine) -> None:
    machine.charge(4)
    machine.push(_new(*machine.pop_many(2)))


# What each opcode does, given the machine and the argument that stands in the pickle.
_OPCODES: dict[str, Callable[[_Machine, Any], Any]] = {
    # No LONG4, which numbers need that are too long for us.
    **dict.fromkeys(["INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"], _push),
    **dict.fromkeys(["FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"], _push),
    **dict.fromkeys(["UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"], _push),
    **dict.fromkeys(["BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"], _push),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_SET": lambda m, _: m.push(set()),
    "LIST": lambda m, _: m.push(m.pop_to_mark()),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.push(tuple(m.pop_many(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.pop_many(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.pop_many(3))),
    "DICT": lambda m, _: m.push(_pairs(m.pop_to_mark())),
    "FROZENSET": lambda m, _: m.push(frozenset(map(_key, m.pop_to_mark()))),
    "APPEND": lambda m, _: m.extend(m.pop_many(1)),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pop_many(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "MARK": lambda m, _: m.push(_MARK),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
    "DUP": lambda m, _: m.push(m.top()),
    **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], lambda m, i: m.push(m.memo[i])),
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT"], lambda m, i: m.memo.update({i: m.top()})),
    "MEMOIZE": lambda m, _: m.memo.update({len(m.memo): m.top()}),
    "GLOBAL": lambda m, name: m.push(_global(*name.split(" ", 1))),
    "STACK_GLOBAL": lambda m, _: m.push(_global(*m.pop_many(2))),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: _new_object(m),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, pid: m.push(m.persistent_load(pid)),
    "BINPERSID": lambda m, _: m.push(m.persistent_load(m.pop())),
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
}
