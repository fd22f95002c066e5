"""Reading the values of a pickle without running the code that it names, in time and memory bounded by its length.

Python's own reader, even with every class replaced, believes what it reads: one flipped bit in a memo's index makes it
fill gigabytes, and a tuple of tuples of tuples as a key takes for ever to hash. Here a pickle holds three kinds of
values: plain ones (texts, numbers, tuples, lists and dictionaries), instances of the classes that the caller knows, and
OTHER for everything else, whose content is read past. The operations are those of protocols 2 to 5 (pickletools.py of
Python's library describes each); an operation that plain data does not need is refused. What is not in the pickle
itself, such as the numbers of tensors in a file of torch.save, it names by persistent ids, which the caller may know.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from struct import unpack_from
from typing import Any

_LONGEST_TEXT = 1 << 16  # bytes
_MOST_WAITING = 1 << 20  # values on the stack, not yet put into another; pickle writes batches of 1,000
_STOP = pickle.STOP[0]
_LONGEST_NUMBER = 16  # bytes: a count of floating-point operations needs more than 64 bits


class KnownInstance:
    """An instance of a class that the caller knows: the attributes in `__slots__`, None until `fill` sets them."""

    __slots__ = ()

    def __init__(self):
        for name in self.__slots__:
            setattr(self, name, None)

    def fill(self, state: Any) -> None:
        """Set the attributes that have slots from `state`; leave the others out."""
        if not isinstance(state, dict):
            raise ValueError(f"the state of a {type(self).__name__} is no dictionary")
        for name in self.__slots__:
            setattr(self, name, state.get(name))


@dataclass(frozen=True)
class KnownCall:
    """A function or class whose call stands for a value: what `make` returns for the tuple of arguments.

    `make` is code of the caller, who must expect any arguments.
    """

    make: Callable[[tuple], Any]


class _Other:
    """A value that is neither plain nor of a known class. OTHER is the one instance."""

    __slots__ = ()


OTHER = _Other()


def _no_persistent(_: Any) -> Any:
    raise ValueError("a persistent id, which plain data does not need")


def read_pickle(data: bytes, known: Callable[[str, str], Any], persistent: Callable[[Any], Any] = _no_persistent
                ) -> Any:
    """Return the value that is pickled in `data`.

    `known(module, name)` says what a global stands for: a subclass of KnownInstance for a class, `tuple` or `dict` for
    a class that is made like one, a KnownCall, any other value for a constant, OTHER for what is to be read past.
    `persistent(id)` says what a persistent id stands for. Raise ValueError, naming the byte, if the pickle is damaged,
    cut off, or holds what no pickle of plain data holds.
    """
    reader = _Reader(data, known, persistent)
    try:
        return reader.run()
    except (IndexError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise ValueError(f"damaged before byte {reader.at}: {type(error).__name__}") from error
    except ValueError as error:
        raise ValueError(f"damaged before byte {reader.at}: {error}") from error
    except Exception as error:  # struct.error, which is no ValueError
        raise ValueError(f"cut off before byte {reader.at}: {error}") from error


class _Reader:
    """The state of reading: the position `at` in `data`, and pickle's stack, marks and memo."""

    def __init__(self, data: bytes, known: Callable[[str, str], Any], persistent: Callable[[Any], Any]):
        self.data, self.known, self.persistent, self.at = data, known, persistent, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        data, stack = self.data, self.stack
        while True:
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                return stack.pop()
            operation = _OPERATIONS[code]
            if operation is None:
                raise ValueError(f"operation {code:#x}, which plain data does not need")
            operation(self)
            if len(stack) > _MOST_WAITING:
                raise ValueError(f"more than {_MOST_WAITING} values that belong to nothing")

    # Operations whose argument follows their byte.

    def take(self, count: int) -> bytes:
        begin, self.at = self.at, self.at + count
        if count < 0 or self.at > len(self.data):
            raise ValueError(f"{count} bytes, of which {len(self.data) - begin} are there")
        return self.data[begin:self.at]

    def number(self, form: str, size: int) -> int:
        (value,) = unpack_from(form, self.data, self.at)
        self.at += size
        return value

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def small(self) -> None:
        self.stack.append(self.data[self.at])
        self.at += 1

    def text(self, count: int) -> None:
        """Read a text; a longer one than any name is read past: protocol 2 stores byte strings as texts."""
        data = self.take(count)
        self.stack.append(data.decode() if count <= _LONGEST_TEXT else OTHER)

    def long(self) -> None:
        count = self.byte()
        if count > _LONGEST_NUMBER:
            raise ValueError(f"a number of {count} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def skip(self, count: int) -> None:
        """Skip a byte string, since no plain value is stored as one."""
        self.take(count)
        self.stack.append(OTHER)

    def frame(self) -> None:
        """Skip a frame's length, which says how much to read at once: everything is in memory already."""
        self.at += 8

    # Operations that make values of others.

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def marked(self) -> list[Any]:
        begin = self.marks.pop()
        values = self.stack[begin:]
        del self.stack[begin:]
        return values

    def tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("a tuple of what is not there")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def extend(self) -> None:
        values = self.marked()
        self.append_to(self.stack[-1], values)

    def append(self) -> None:
        value = self.stack.pop()
        self.append_to(self.stack[-1], (value,))

    def append_to(self, target: Any, values) -> None:
        if target is not OTHER:
            if type(target) is not list:
                raise ValueError(f"an entry for a {type(target).__name__}")
            target.extend(values)

    def set_items(self) -> None:
        values = self.marked()
        self.set_in(self.stack[-1], values)

    def set_item(self) -> None:
        values = self.stack[-2:]
        del self.stack[-2:]
        self.set_in(self.stack[-1], values)

    def set_in(self, target: Any, values: list[Any]) -> None:
        """Set entries of a dictionary, without keys that are no text, number or known instance.

        Hashing such a key can take for ever.
        """
        if target is OTHER:
            return
        if type(target) is not dict or len(values) % 2:
            raise ValueError(f"a key for a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2]):
            if isinstance(key, (str, int, KnownInstance)):
                target[key] = value

    # Operations that make instances.

    def global_lines(self) -> None:
        begin = self.at
        first = self.data.index(b"\n", begin, begin + _LONGEST_TEXT)
        second = self.data.index(b"\n", first + 1, first + _LONGEST_TEXT)
        self.at = second + 1
        self.stack.append(self.known(self.data[begin:first].decode(), self.data[first + 1:second].decode()))

    def global_of_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global without a name")
        self.stack.append(self.known(module, name))

    def new(self) -> None:
        self.stack.pop()
        kind = self.stack.pop()
        self.stack.append(kind() if isinstance(kind, type) and issubclass(kind, KnownInstance) else OTHER)

    def new_with_names(self) -> None:
        self.stack.pop()
        self.new()

    def call(self) -> None:
        """Make the value of a call without calling what it names: a tuple is its argument, a dictionary is empty."""
        arguments, what = self.stack.pop(), self.stack.pop()
        if isinstance(what, KnownCall):
            self.stack.append(what.make(arguments))
        elif what is tuple:
            (value,) = arguments
            if type(value) is not tuple:
                raise ValueError(f"a tuple of a {type(value).__name__}")
            self.stack.append(value)
        else:
            self.stack.append({} if what is dict else OTHER)

    def persistent_id(self) -> None:
        self.stack.append(self.persistent(self.stack.pop()))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, KnownInstance):
            target.fill(state)
            if type(state) is dict:
                state.clear()  # the memo still holds it, and nothing refers to it again
        elif target is not OTHER and type(target) is not dict:
            raise ValueError(f"a state for a {type(target).__name__}")

    # The memo.

    def memoize(self) -> None:
        self.memo.append(self.stack[-1])

    def put(self, index: int) -> None:
        if index > len(self.memo):
            raise ValueError(f"memo {index} after {len(self.memo)}")
        self.memo[index:index + 1] = [self.stack[-1]]

    def get(self) -> None:
        self.stack.append(self.memo[self.data[self.at]])
        self.at += 1

    def get_far(self) -> None:
        self.stack.append(self.memo[int.from_bytes(self.take(4), "little")])


def _push(value: Any) -> Callable[[_Reader], None]:
    return lambda reader: reader.stack.append(value)


_BY_CODE: dict[bytes, Callable[[_Reader], Any]] = {
    pickle.PROTO: lambda reader: reader.take(1), pickle.FRAME: _Reader.frame,
    pickle.MARK: _Reader.mark,
    pickle.POP: lambda reader: reader.stack.pop(), pickle.POP_MARK: _Reader.marked,
    pickle.NONE: _push(None), pickle.NEWTRUE: _push(True), pickle.NEWFALSE: _push(False),
    pickle.BININT: lambda reader: reader.stack.append(reader.number("<i", 4)),
    pickle.BININT1: _Reader.small, pickle.BININT2: lambda reader: reader.stack.append(reader.number("<H", 2)),
    pickle.BINFLOAT: lambda reader: reader.stack.append(reader.number(">d", 8)), pickle.LONG1: _Reader.long,
    pickle.SHORT_BINUNICODE: lambda reader: reader.text(reader.byte()),
    pickle.BINUNICODE: lambda reader: reader.text(reader.number("<I", 4)),
    pickle.BINUNICODE8: lambda reader: reader.text(reader.number("<Q", 8)),
    pickle.SHORT_BINBYTES: lambda reader: reader.skip(reader.byte()),
    pickle.BINBYTES: lambda reader: reader.skip(reader.number("<I", 4)),
    pickle.BINBYTES8: lambda reader: reader.skip(reader.number("<Q", 8)),
    pickle.EMPTY_TUPLE: _push(()), pickle.TUPLE: lambda reader: reader.stack.append(tuple(reader.marked())),
    pickle.TUPLE1: lambda reader: reader.tuple(1), pickle.TUPLE2: lambda reader: reader.tuple(2),
    pickle.TUPLE3: lambda reader: reader.tuple(3),
    pickle.EMPTY_LIST: lambda reader: reader.stack.append([]), pickle.APPEND: _Reader.append,
    pickle.APPENDS: _Reader.extend, pickle.EMPTY_DICT: lambda reader: reader.stack.append({}),
    pickle.SETITEM: _Reader.set_item, pickle.SETITEMS: _Reader.set_items,
    pickle.EMPTY_SET: _push(OTHER), pickle.ADDITEMS: _Reader.extend,
    pickle.FROZENSET: lambda reader: (reader.marked(), reader.stack.append(OTHER)),
    pickle.GLOBAL: _Reader.global_lines, pickle.STACK_GLOBAL: _Reader.global_of_stack, pickle.NEWOBJ: _Reader.new,
    pickle.NEWOBJ_EX: _Reader.new_with_names, pickle.REDUCE: _Reader.call, pickle.BUILD: _Reader.build,
    pickle.BINPERSID: _Reader.persistent_id,
    pickle.MEMOIZE: _Reader.memoize, pickle.BINPUT: lambda reader: reader.put(reader.byte()),
    pickle.LONG_BINPUT: lambda reader: reader.put(reader.number("<I", 4)),
    pickle.BINGET: _Reader.get, pickle.LONG_BINGET: _Reader.get_far,
}
_OPERATIONS = [_BY_CODE.get(bytes([code])) for code in range(256)]
