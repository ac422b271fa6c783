"""A value has one spelling and one hash, whatever order, process or container it comes in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.fingerprint import canonical_json, digest_file, digest_strings, fingerprint

SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SCALARS | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)


def reversed_keys(value: Any) -> Any:
    """The same value with every dict's keys in the opposite order."""
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


def test_the_hash_is_plain_sha256_of_plain_json() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "ü"}) == '{"a":"ü","b":[1,2.5]}'.encode()
    assert fingerprint({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()


@given(VALUES)
def test_the_order_of_keys_does_not_count(value: Any) -> None:
    assert fingerprint(reversed_keys(value)) == fingerprint(value)


@given(VALUES)
def test_a_value_that_went_through_a_json_file_keeps_its_fingerprint(value: Any) -> None:
    assert fingerprint(json.loads(json.dumps(value))) == fingerprint(value)
    assert fingerprint(json.loads(canonical_json(value))) == fingerprint(value)


@given(VALUES, VALUES)
def test_values_that_json_tells_apart_have_different_fingerprints(one: Any, other: Any) -> None:
    spelled = [json.dumps(value, sort_keys=True) for value in (one, other)]
    assert (fingerprint(one) == fingerprint(other)) == (spelled[0] == spelled[1])


def test_a_tuple_is_the_list_that_json_makes_of_it_but_a_number_is_not_its_spelling() -> None:
    assert fingerprint((1, (2, 3))) == fingerprint([1, [2, 3]])
    assert len({fingerprint(value) for value in (1, 1.0, True, "1", [1], None)}) == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_what_json_cannot_spell_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint(value)


def test_objects_are_refused_rather_than_spelled_somehow() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        fingerprint({"path": Path("a")})


@pytest.mark.parametrize("num_bytes", [0, 1, 100_000])
def test_a_file_is_digested_as_its_bytes(tmp_path: Path, num_bytes: int) -> None:
    data = bytes(range(256)) * (num_bytes // 256 + 1)
    (tmp_path / "file").write_bytes(data[:num_bytes])
    assert digest_file(tmp_path / "file") == hashlib.sha256(data[:num_bytes]).hexdigest()


@given(st.lists(st.text(alphabet='ab"\\\n ', max_size=3), max_size=4), st.data())
def test_lists_of_strings_collide_only_if_they_are_equal(strings: list[str], data: st.DataObject) -> None:
    joined = ["".join(strings)] if strings else []
    other = data.draw(st.permutations(strings) | st.just(joined) | st.just([*strings, ""]))
    assert (digest_strings(strings) == digest_strings(other)) == (strings == other)
    assert digest_strings(iter(strings)) == digest_strings(strings)
