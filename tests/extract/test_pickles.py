"""A pickle is read as data or refused with a sentence: nothing that it names is called, whatever its instructions."""

from __future__ import annotations

import builtins
import copyreg
import os
import pickle
import pickletools
import struct
import tracemalloc
from collections import OrderedDict, deque
from collections.abc import Callable
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.errors import UsageError
from extract.datasets import DATASETS
from extract.datasets.faults import AnnotationError
from extract.datasets.pickles import PickledList
from extract.datasets.records import Source
from extract.prepare import PrepareConfig, prepare
from tests.extract import python2_pickles
from tests.extract.coco_files import write_images, write_instances

KEYS = st.text(max_size=5) | st.integers(-(2**40), 2**40) | st.booleans() | st.none() | st.binary(max_size=5)
SCALARS = (
    KEYS | st.floats(allow_nan=False) | st.binary(min_size=250, max_size=300) | st.text(min_size=250, max_size=260)
)
DATA = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.tuples(inner)
        | st.lists(inner, max_size=5).map(tuple)
    ),
    max_leaves=20,
)
SETS = st.sets(KEYS, max_size=5) | st.frozensets(KEYS, max_size=5)


def as_read(value: Any) -> Any:
    """Compares what Python holds to be equal: 1, 1.0 and True."""
    return repr(value) if not isinstance(value, set | frozenset) else sorted(map(repr, value))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pickles") / "refs.p"


def read(path: Path, data: bytes) -> list[Any]:
    path.write_bytes(data)
    return list(PickledList(path))


@given(items=st.lists(DATA | SETS, max_size=6), protocol=st.integers(0, 5))
def test_data_comes_back_as_python_pickled_it(place: Path, items: list[Any], protocol: int) -> None:
    data = pickle.dumps(items, protocol)
    if b"c_codecs\n" in data or b"c__builtin__\nbytes\n" in data:  # how Python 3, and no other, writes bytes so old
        with pytest.raises(AnnotationError, match=r"asks for (_codecs\.encode|__builtin__\.bytes)"):
            read(place, data)
    else:
        assert list(map(as_read, read(place, data))) == list(map(as_read, items))


@given(
    items=st.lists(
        st.recursive(
            st.text(max_size=5) | st.integers(-(2**40), 2**40) | st.booleans() | st.none() | st.floats(allow_nan=False),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
            max_leaves=20,
        ),
        max_size=6,
    ),
    protocol=st.sampled_from([0, 2]),
)
def test_data_comes_back_as_python_2_pickled_it(place: Path, items: list[Any], protocol: int) -> None:
    assert repr(read(place, python2_pickles.dump(items, protocol))) == repr(items)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.sampled_from([0, 2]))
def test_a_str_of_python_2_is_its_utf8(place: Path, text: str, protocol: int) -> None:
    assert read(place, python2_pickles.dump([text.encode()], protocol)) == [text]


def test_bytes_that_are_no_utf8_come_as_halves_of_surrogate_pairs(place: Path) -> None:
    for protocol in (0, 2):
        assert read(place, python2_pickles.dump([b"caf\xe9"], protocol)) == ["caf\udce9"]
    assert read(place, b"\x80\x02]X\x02\x00\x00\x00\xff\xfea.") == ["\udcff\udcfe"]


def test_a_pickle_as_python_2_wrote_it_literally(place: Path) -> None:
    first = b"(dp2\nS'sent'\np3\nS'it\\'s a \\\\ caf\\xc3\\xa9'\np4\nsS'n'\nI7\nsS'l'\nL7L\nsa"
    second = b"(dp5\ng3\nVa\\u00e9\np6\nsa"
    assert read(place, b"(lp1\n" + first + second + b".") == [
        {"sent": "it's a \\ café", "n": 7, "l": 7},
        {"sent": "aé"},
    ]


def test_items_are_built_anew_each_time_and_not_held(place: Path) -> None:
    num, size = 400, 5_000
    refs = [{"ref_id": number, "text": chr(97 + number % 26) * size + str(number)} for number in range(num)]
    place.write_bytes(pickle.dumps(refs, 0))
    items = PickledList(place)
    assert [item["ref_id"] for item in items] == [item["ref_id"] for item in items] == list(range(num))
    tracemalloc.start()
    try:
        assert sum(len(item["text"]) for item in items) > num * size
        assert tracemalloc.get_traced_memory()[1] < num * size / 4
    finally:
        tracemalloc.stop()


class Calling:
    """Python pickles this as a call of anything with any arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def system(marker: Path) -> str:
    return f"touch {marker}"


def python(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def line(text: str) -> bytes:
    return text.encode() + b"\n"


def short(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


MALICIOUS: dict[str, Callable[[Path], bytes]] = {
    **{
        f"os.system, protocol {protocol}": lambda marker, protocol=protocol: pickle.dumps(
            [Calling(os.system, system(marker))], protocol
        )
        for protocol in range(6)
    },
    "builtins.eval": lambda marker: pickle.dumps([Calling(builtins.eval, python(marker))], 2),
    "builtins.exec, protocol 4": lambda marker: pickle.dumps([Calling(builtins.exec, python(marker))], 4),
    "builtins.getattr": lambda marker: pickle.dumps([Calling(getattr, "x", "upper")], 2),
    "inside an item": lambda marker: pickle.dumps([{"sentences": [{"sent": Calling(os.system, system(marker))}]}], 2),
    "as a key": lambda marker: b"\x80\x02](}c" + line("os") + line("system") + short(system(marker)) + b"\x85RK\x01se.",
    "GLOBAL alone": lambda marker: b"]c" + line("os") + line("system") + b"a.",
    "GLOBAL of posix": lambda marker: b"(lcposix\nsystem\n(S'" + system(marker).encode() + b"'\ntRa.",
    "INST": lambda marker: b"](S'" + system(marker).encode() + b"'\nios\nsystem\na.",
    "INST of a set": lambda marker: b"](i__builtin__\nset\na.",
    "OBJ": lambda marker: b"](cos\nsystem\n" + short(system(marker)) + b"oa.",
    "OBJ of a set": lambda marker: b"](c__builtin__\nset\noa.",
    "NEWOBJ": lambda marker: b"\x80\x02]c__builtin__\nset\n)\x81a.",
    "NEWOBJ_EX": lambda marker: b"\x80\x04]c__builtin__\nset\n)}\x92a.",
    "STACK_GLOBAL": lambda marker: (
        b"\x80\x04]" + short("os") + short("system") + b"\x93" + short(system(marker)) + b"\x85Ra."
    ),
    "STACK_GLOBAL of a set": lambda marker: b"\x80\x04]" + short("builtins") + short("set") + b"\x93)Ra.",
    "STACK_GLOBAL with dots": lambda marker: b"\x80\x04]" + short("builtins") + short("set.mro") + b"\x93)Ra.",
    "REDUCE of a text": lambda marker: b"](lX\x01\x00\x00\x00a)Ra.",
    "REDUCE of a set with two arguments": lambda marker: b"]c__builtin__\nset\n]]\x86Ra.",
    "REDUCE of a set made of a text": lambda marker: b"]c__builtin__\nset\n" + short("ab") + b"\x85Ra.",
    "BUILD": lambda marker: pickle.dumps([Calling(OrderedDict, state={"x": 1})], 2),
    "BUILD of a set": lambda marker: b"]c__builtin__\nset\n)R}b.a.",
    "BUILD of the class of sets": lambda marker: b"]c__builtin__\nset\n}" + short("x") + b"K\x01sba.",
    "a persistent id, text": lambda marker: b"(lPsomething\na.",
    "a persistent id, binary": lambda marker: b"]K\x01Qa.",
    "an extension of one byte": lambda marker: b"\x80\x02]\x82\xf0" + short(system(marker)) + b"\x85Ra.",
    "an extension of two bytes": lambda marker: b"\x80\x02]\x83\xf0\x00" + short(system(marker)) + b"\x85Ra.",
    "an extension of four bytes": lambda marker: b"\x80\x02]\x84\xf0\x00\x00\x00" + short(system(marker)) + b"\x85Ra.",
    "a buffer outside": lambda marker: b"\x80\x05]\x97a.",
    "numpy's": lambda marker: pickle.dumps([np.ones(3)], 2),
    "a date": lambda marker: pickle.dumps([date(2014, 1, 1)], 2),
    "a fraction": lambda marker: pickle.dumps([Fraction(1, 2)], 4),
    "a deque": lambda marker: pickle.dumps(deque([1]), 4),
    "a complex number": lambda marker: pickle.dumps([1j], 4),
    "a class": lambda marker: pickle.dumps([Path], 4),
}


@pytest.mark.parametrize("attack", MALICIOUS)
def test_a_pickle_that_asks_for_more_than_data_is_refused_and_nothing_happens(
    tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "executed"
    root = tmp_path / "dataset"
    write_images(root / "images")
    write_instances(root)
    (root / "refs(unc).p").write_bytes(MALICIOUS[attack](marker))
    before = sorted(tmp_path.rglob("*"))
    with registered(os.system, 0xF0):
        for config in (PrepareConfig("refcoco", root, tmp_path / "stores", skip_bad=skip) for skip in (False, True)):
            with pytest.raises(AnnotationError, match=r"refs\(unc\)\.p is refused: .*\. Fetch the file again from"):
                prepare(config)
    assert not marker.exists()
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written"


class registered:  # noqa: N801  a context manager
    """A function in the extension registry, and in its cache as if some pickle had used it."""

    def __init__(self, function: Callable[..., Any], code: int) -> None:
        self.entry = function.__module__, function.__name__, code
        self.function = function

    def __enter__(self) -> None:
        copyreg.add_extension(*self.entry)
        copyreg._extension_cache[self.entry[2]] = self.function

    def __exit__(self, *exception: object) -> None:
        copyreg.clear_extension_cache()
        copyreg.remove_extension(*self.entry)


@pytest.mark.parametrize("attack", ["os.system, protocol 0", "os.system, protocol 4", "builtins.eval", "INST", "OBJ"])
def test_the_attacks_work_on_an_unpickler_that_calls(tmp_path: Path, attack: str) -> None:
    """Otherwise the test above would prove nothing."""
    marker = tmp_path / "executed"
    pickle.loads(MALICIOUS[attack](marker))
    assert marker.exists()


def test_the_refusal_names_what_was_asked_for(place: Path, tmp_path: Path) -> None:
    for attack, named in (
        ("os.system, protocol 2", r"it asks for posix\.system|it asks for os\.system|it asks for nt\.system"),
        ("INST", r"it asks for os\.system"),
        ("STACK_GLOBAL", "it holds the instruction STACK_GLOBAL"),
        ("a persistent id, text", "it holds the instruction PERSID"),
        ("an extension of one byte", "it holds the instruction EXT1"),
        ("BUILD of a set", "it holds the instruction BUILD"),
        ("REDUCE of a text", "it calls something"),
    ):
        with pytest.raises(AnnotationError, match=named):
            read(place, MALICIOUS[attack](tmp_path / "executed"))


def test_no_instruction_but_those_of_data_is_carried_out(place: Path) -> None:
    names = {ord(op.code): op.name for op in pickletools.opcodes}
    refused = set()
    for code in range(256):
        what = f"instruction {names[code]}" if code in names else f"byte {code:#04x}"
        with pytest.raises(AnnotationError) as caught:
            read(place, b"](" + bytes([code]) + b"nobody\nnothing\n" + b"\xff" * 300)
        if f"it holds the {what}, and only plain data" in str(caught.value) or "nobody.nothing" in str(caught.value):
            refused.add(names.get(code, "unknown"))
    calling = "PERSID BINPERSID GLOBAL INST OBJ NEWOBJ NEWOBJ_EX STACK_GLOBAL BUILD EXT1 EXT2 EXT4 NEXT_BUFFER"
    never_written_for_data = "POP POP_MARK DUP READONLY_BUFFER"
    assert refused == {*calling.split(), *never_written_for_data.split(), "unknown"}


HUGE = 2**31 - 1
BOMBS: dict[str, bytes] = {
    "BINBYTES": b"\x80\x03]B" + struct.pack("<I", HUGE) + b"xa.",
    "BINBYTES8": b"\x80\x04]\x8e" + struct.pack("<Q", 2**62) + b"xa.",
    "BINUNICODE8": b"\x80\x04]\x8d" + struct.pack("<Q", 2**63) + b"xa.",
    "BYTEARRAY8": b"\x80\x05]\x96" + struct.pack("<Q", 2**40) + b"xa.",
    "BINSTRING of a negative length": b"]T" + struct.pack("<i", -5) + b"xa.",
    "LONG4": b"\x80\x02]\x8b" + struct.pack("<i", HUGE) + b"xa.",
    "LONG4 of a negative length": b"\x80\x02]\x8b" + struct.pack("<i", -1) + b"xa.",
    "LONG1 of 255 bytes": b"\x80\x02]\x8a\xff" + b"\x7f" * 255 + b"a.",
    "a number of a million digits": b"(lI" + b"9" * 1_000_000 + b"\na.",
    "a long of a million digits": b"(lL" + b"9" * 1_000_000 + b"L\na.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_length_beyond_the_file_or_reason_is_refused_without_taking_the_memory(place: Path, bomb: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(AnnotationError, match=r"is refused: it (is cut short|holds a number that no annotation)"):
            read(place, BOMBS[bomb])
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02]r\xff\xff\xff\x7f(K\x01K\x01e.",
        b"\x80\x02](K\x01r\xff\xff\xff\x7fj\xff\xff\xff\x7fe.",
        b"(lp4294967295\nI1\naI1\na.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f](K\x01K\x01e.",
    ],
    ids=["a far place of the memo", "one that is used", "one in text", "a frame"],
)
def test_far_places_of_the_memo_and_huge_frames_take_no_memory(place: Path, data: bytes) -> None:
    """Python's own unpickler makes room for every place before."""
    tracemalloc.start()
    try:
        assert read(place, data) == [1, 1]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", range(6))
def test_a_file_that_is_cut_short_anywhere_is_refused(place: Path, protocol: int) -> None:
    data = pickle.dumps([{"ref_id": 1, "split": "train", "n": [1.5, 300, 70000, 2**40, None, True]}], protocol)
    for size in range(1, len(data)):
        with pytest.raises(AnnotationError):
            read(place, data[:size])


@given(data=st.binary(min_size=1, max_size=60))
def test_whatever_the_bytes_they_are_read_or_refused(place: Path, data: bytes) -> None:
    for made in (data, b"\x80\x02](" + data, b"(l" + data + b"."):
        try:
            read(place, made)
        except AnnotationError:
            continue


@given(
    st.lists(
        st.sampled_from([bytes([code]) for code in b"()]}ltdaesu0NR\x85\x86\x8f\x90\x91\x94"])
        | st.sampled_from([b"K\x01", b"q\x01", b"h\x01", b"U\x01a", b"c__builtin__\nset\n", b"I01\n", b"S'a'\n"]),
        max_size=25,
    )
)
def test_whatever_the_instructions_they_fit_together_or_are_refused(place: Path, instructions: list[bytes]) -> None:
    try:
        read(place, b"]" + b"".join(instructions) + b".")
    except AnnotationError:
        return


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "is empty"),
        (b"not a pickle\n", "holds the byte 0x6e"),
        (b'{"refs": []}', "holds the byte 0x7b"),
        (b"\x80\x07].", "is of protocol 7, and none after 5 is known"),
        (b".", "does not end with one value"),
        (b"]]].", "does not end with one value"),
        (b"](.", "does not end with one value"),
        (b"a.", "do not fit together"),
        (b"]h\x05a.", "do not fit together"),
        (b"(lg" + b"9" * 1_000_000 + b"\na.", "do not fit together"),
        (b"](K\x01u.", "adds to a list as to an object"),
        (b"}K\x01a.", "adds to an object as to a list"),
        (b"]}(K\x01ua.", "a key has no value"),
        (b"]}]K\x01sa.", "a key is a list"),
        (b"](]\x91a.", "a key is a list"),
        (b"]S'a\na.", "a text without its quotes"),
        (b"]S'\\q'\na.", "do not fit together"),
        (b"]Fx\na.", "could not convert"),
        (b"]VX\\u12\na.", "is refused"),
    ],
)
def test_what_is_no_pickle_of_a_list_is_refused_in_a_sentence(place: Path, data: bytes, complaint: str) -> None:
    with pytest.raises(AnnotationError, match=complaint):
        read(place, data)


def refs_with(data: bytes, root: Path) -> list[str]:
    """The faults of a dataset whose refs are this pickle."""
    write_images(root / "images")
    write_instances(root)
    (root / "refs(unc).p").write_bytes(data)
    source = Source(root)
    for _ in DATASETS["refcoco"].read(source).samples:
        pass
    return [str(fault) for fault in source.faults.faults]


DEEP = 100_000


@pytest.mark.parametrize(
    "nested",
    [b"]" * DEEP + b"a" * (DEEP - 1), b")" + b"\x85" * DEEP, b"}" + b"K\x01}" * DEEP + b"s" * DEEP],
    ids=["lists", "tuples", "dicts"],
)
def test_deep_nesting_is_a_fault_of_its_item_whatever_the_key(tmp_path: Path, nested: bytes) -> None:
    data = b"\x80\x02](" + b"".join(b"}" + short(key) + nested + b"s" for key in ("ref_id", "sentences", "tags", "x"))
    faults = refs_with(data + nested + b"e.", tmp_path)
    assert all(any(f"item {number}" in fault for fault in faults) for number in range(5))
    assert all(len(fault) < 500 for fault in faults)


@pytest.mark.parametrize("key", ["ref_id", "ann_id", "image_id", "split", "sentences", "tags"])
def test_lists_that_share_their_content_are_not_written_out_in_messages(tmp_path: Path, key: str) -> None:
    doubled = b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(18))
    data = b"\x80\x02](}" + short(key) + b"(" + doubled + b"tse."
    assert all(len(fault) < 500 for fault in refs_with(data, tmp_path))


def test_a_list_that_holds_itself_is_a_fault(tmp_path: Path) -> None:
    faults = refs_with(b"\x80\x02](}" + short("sentences") + b"]q\x00h\x00ase.", tmp_path)
    assert any("sentences item 0: must be an object, is a list" in fault for fault in faults)


def test_a_tuple_of_a_million_as_a_key_does_not_overflow_the_stack(place: Path) -> None:
    with pytest.raises(AnnotationError, match="a key is a tuple"):
        read(place, b"\x80\x02]})" + b"\x85" * 1_000_000 + b"K\x01sa.")


def test_a_folder_or_a_pipe_in_place_of_the_pickle_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(UsageError, match=f"{name} is no regular file"):
            PickledList(tmp_path / name)
    with pytest.raises(UsageError, match=r"cannot be read \(No such file"):
        PickledList(tmp_path / "nothing")
