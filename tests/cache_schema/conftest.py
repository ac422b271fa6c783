"""What tests of stores share: an S3 server with a bucket for each, and the same small store in every container."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from upath import UPath

from cache_schema.atomic import StorePath, parse_path
from cache_schema.convert import convert_store
from tests.cache_schema.toys import write_store
from tests.s3 import serve_s3


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """The address of an S3 server that s3:// paths lead to."""
    with serve_s3() as address:
        yield address


@pytest.fixture
def bucket(s3_address: str) -> UPath:
    """An empty bucket."""
    path = parse_path(f"s3://bucket-{uuid.uuid4().hex}")
    assert isinstance(path, UPath)
    path.mkdir()
    return path


FILES = ("zarr", "zstd", "memory", "s3")
"""Containers in which a shard is a file or an object of its own."""


@pytest.fixture(params=[*FILES, "hdf5"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> StorePath:
    """The small store of toys.py in each container: plain and compressed zarr, two remote filesystems, and HDF5."""
    return _write_in(request.param, request, tmp_path)


@pytest.fixture(params=FILES)
def stored_as_files(request: pytest.FixtureRequest, tmp_path: Path) -> StorePath:
    """The same in every container but HDF5."""
    return _write_in(request.param, request, tmp_path)


def _write_in(container: str, request: pytest.FixtureRequest, folder: Path) -> StorePath:
    match container:
        case "zarr":
            return write_store(folder)
        case "zstd":
            return convert_store(write_store(folder), folder / "zstd", "zarr", zstd_level=3)
        case "hdf5":
            return convert_store(write_store(folder), folder, "hdf5")
        case "memory":
            return write_store(parse_path(f"memory://{uuid.uuid4().hex}"))
        case _:
            return write_store(request.getfixturevalue("bucket"))


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest) -> UPath:
    """An empty place on each remote filesystem."""
    if request.param == "s3":
        return request.getfixturevalue("bucket")
    path = parse_path(f"memory://{uuid.uuid4().hex}")
    assert isinstance(path, UPath)
    return path
