"""checkpoint/dcp/pickle_values.py: what Python's reader gives of plain data; no code, memory or time for the rest."""

import collections
import pickle
import pickletools
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pickle_damage import Bomb, mutations

from megatron_deepseek.checkpoint.dcp.pickle_values import OTHER, KnownInstance, read_pickle

PLAIN = [None, True, 0, 255, -1, 65_535, 2**31, -2**62, 2**63, 1.5, "", "a", "é" * 300, (), (1,), (1, "b"), (1, 2, 3),
         (1, 2, 3, 4), [], [1, [2, (3,)]], {}, {"a": 1, 2: [3], "b": {"c": None}}, ["same"] * 3, list(range(3000)),
         {str(number): number for number in range(3000)}]


class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y


class OurPoint(KnownInstance):
    __slots__ = ("x", "z")


def known(module, name):
    return {"Point": OurPoint, "OrderedDict": dict, "tuple": tuple}.get(name, OTHER)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:20])
def test_plain_data_is_what_python_reads(value, protocol):
    data = pickle.dumps(value, protocol)
    assert read_pickle(data, known) == value
    assert read_pickle(pickletools.optimize(data), known) == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_instances_are_records_and_what_is_unknown_is_other(protocol):
    value = [Point(1, "y"), collections.OrderedDict(a=1), Path("/"), {1, 2}, frozenset("a"), b"bytes" * 100, 1j]
    ours = read_pickle(pickle.dumps(value, protocol), known)
    assert (type(ours[0]), ours[0].x, ours[0].z) == (OurPoint, 1, None)
    assert ours[1:] == [{"a": 1}] + [OTHER] * 5
    assert read_pickle(pickle.dumps({(1, 2): 3, Path("/"): 4, "a": 5}, protocol), known) == {"a": 5}


def nested_key(depth: int) -> bytes:
    """A dictionary whose key takes 2**depth steps to hash: a pair of the same pair of the same pair."""
    pairs = b"".join(b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86\x940" for level in range(depth))
    return b"\x80\x04})\x940" + pairs + b"h" + bytes([depth]) + b"K\x01s."


UNSOUND = {
    "a memo of 16 GB": b"\x80\x02]r\xff\xff\xff\x7f.", "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "a text of 2**63": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b".",
    "bytes of 4 GB": b"\x80\x03B\xff\xff\xff\xff.", "a frame of 2**62": b"\x80\x04\x95" + struct.pack("<Q", 2**62),
    "a number of 255 bytes": b"\x80\x04\x8a\xff" + b"\x01" * 255 + b".", "nothing": b"", "no end": b"\x80\x04K\x01",
    "an empty stack": b"\x80\x04.", "a mark that is missing": b"\x80\x04t.", "an entry for a number": b"K\x01K\x02a.",
    "text operations": b"I1\n.", "persistent names": b"K\x01Q.", "extensions": b"\x82\x01.",
    "no UTF-8": b"X\x01\0\0\0\xff.",
    "an unknown memo": b"h\x05.", "odd items": b"}(K\x01u.", "a global that is no name": b"K\x01K\x02\x93.",
    "a tuple of a list": b"c__main__\ntuple\n]\x85R.", "a state for a list": b"]}b.",
    "millions that belong to nothing": b"N" * 3_000_000 + b".",
}


@pytest.mark.parametrize("what", UNSOUND)
def test_unsound_pickles_are_refused(what):
    with pytest.raises(ValueError, match="before byte [0-9]+: ") as caught:
        read_pickle(UNSOUND[what], known)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_no_key_takes_for_ever_to_hash():
    begun = time.process_time()
    assert pickle.loads(nested_key(3)) == {((((), ()), ((), ())), (((), ()), ((), ()))): 1}
    assert read_pickle(nested_key(60), known) == {}
    assert time.process_time() - begun < 1


def test_nothing_is_run_in_any_protocol(tmp_path):
    for protocol in range(6):
        for value in (Bomb(tmp_path / "boom"), [Bomb(tmp_path / "boom")], {"a": Bomb(tmp_path / "boom")}):
            try:
                read_pickle(pickle.dumps(value, protocol), known)
            except ValueError:
                assert protocol < 2
    assert not (tmp_path / "boom").exists()


def test_mutations_cost_neither_memory_nor_time():
    """In a process that may have little of both."""
    here = Path(__file__)
    paths = [str(here.parent), *(path for path in sys.path if path.endswith("helpers"))]
    program = f"""import sys; sys.path[:0] = {paths!r}
from {here.stem} import survive_mutations
survive_mutations()"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def survive_mutations() -> None:
    data = b"".join(pickle.dumps({"a": [Point(1, (2, number)) for number in range(20)], "b": PLAIN[:-2]}, protocol)[:-1]
                    for protocol in (4, 2)) + b"."
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    for changed in mutations(data, 3000, 0):
        try:
            read_pickle(changed, known)
        except ValueError as error:
            assert "\n" not in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 50_000  # KiB
    assert time.process_time() - begun < 60
