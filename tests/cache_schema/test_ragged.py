"""Lists of unequal lengths survive being laid end to end."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.ragged import offsets_of, pack_bytes, pack_strings, unpack_bytes, unpack_strings


@given(st.lists(st.binary(max_size=8)))
def test_byte_strings_come_back_as_they_were(items: list[bytes]) -> None:
    values, offsets = pack_bytes(items)
    assert values.tobytes() == b"".join(items)
    assert unpack_bytes(values, offsets) == items


@given(st.lists(st.text(max_size=8)))
def test_strings_come_back_as_they_were_whatever_their_script(items: list[str]) -> None:
    assert unpack_strings(*pack_strings(items)) == items


@given(st.lists(st.integers(0, 5)))
def test_list_m_lies_between_offset_m_and_offset_m_plus_one(lengths: list[int]) -> None:
    offsets = offsets_of(lengths)
    assert offsets.shape == (len(lengths) + 1,)
    assert offsets[0] == 0
    assert np.diff(offsets).tolist() == lengths


def test_packed_arrays_have_the_types_that_stores_are_declared_with() -> None:
    for items in ([], [""], ["a", "öä"]):
        values, offsets = pack_strings(items)
        assert (values.dtype, offsets.dtype) == (np.uint8, np.int64)


def test_offsets_of_a_stream_are_those_of_the_list() -> None:
    assert offsets_of(iter([2, 0, 3])).tolist() == [0, 2, 2, 5]
