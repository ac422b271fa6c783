"""docs/cache-format.md and the stores that the code writes say the same, name by name and both ways."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, get_args

import h5py
import numpy as np
import pytest
import xxhash
import zarr
from awscrt.checksums import crc32c

from cache_schema import SCHEMA_VERSION
from cache_schema.convert import convert_store
from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.features import ImageFeatures
from cache_schema.fingerprint import canonical_json
from cache_schema.layout import ArrayLayout
from cache_schema.masks import encode_mask
from cache_schema.quantize import quantize
from cache_schema.samples import open_samples, read_strings, write_samples
from cache_schema.shards import encode_shard
from cache_schema.store import Store, StoreKind, open_store
from cache_schema.views import ASPECTS, MAX_WINDOWS, PADDING_RGB, View, fit_view, make_views
from extract.encoders.specs import AttentionOutput
from tests.cache_schema.document import (
    DOCUMENT,
    OPTIONAL,
    FoundArrays,
    Row,
    array_faults,
    codes,
    fits,
    name_faults,
    name_of,
    object_faults,
    parse_document,
    parse_hexdump,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from extract.encoders.image import HubImageEncoder
    from extract.encoders.tiny import TinyEncoders
    from extract.job import Extraction

PAGE = parse_document(DOCUMENT.read_text())

KINDS = {"samples": "samples", "image_features": "image features", "prompt_features": "prompt features"}
"""What the headings call the stores of a kind."""

OBJECTS = (
    "Root metadata",
    "Group metadata",
    "Attributes",
    *(f"Identity of {name}" for name in KINDS.values()),
    "Image encoder",
    "Text encoder",
    "Recorded of samples",
    "Recorded of features",
    "Receipts",
    "Stored files",
    "Failures",
    "The manifest",
)
ARRAYS = tuple(f"Arrays of {name}" for name in KINDS.values())
ATTENTION_OUTPUTS: tuple[AttentionOutput, ...] = ("logits", "mean_token", "head_tokens")
OTHERS = (
    *("Data types", "Field types", "Kinds of store", "Files of a store", "Views", "What the encoder sees"),
    "Array metadata",
    *("Canonical JSON", "Units", "Datasets", "Versions"),
)


@dataclass(frozen=True)
class ZarrStore:
    """A store in a folder as a stranger finds it: JSON files and names, nothing parsed by the code under test."""

    path: Path

    def json(self, key: str) -> Any:
        return json.loads((self.path / key).read_bytes())

    @cached_property
    def root(self) -> dict[str, Any]:
        return self.json("zarr.json")

    @cached_property
    def attributes(self) -> dict[str, Any]:
        return self.root["attributes"]["headstart"]

    @property
    def kind(self) -> str:
        return self.attributes["kind"]

    @property
    def identity(self) -> dict[str, Any]:
        return self.attributes["identity"]

    @cached_property
    def nodes(self) -> dict[str, Any]:
        return self.root["consolidated_metadata"]["metadata"]

    @cached_property
    def arrays(self) -> dict[str, Any]:
        return {name: node for name, node in self.nodes.items() if node["node_type"] == "array"}

    @cached_property
    def receipts(self) -> dict[str, Any]:
        return {path.stem: json.loads(path.read_bytes()) for path in sorted((self.path / "receipts").iterdir())}

    @cached_property
    def ledger(self) -> list[Any]:
        return [json.loads(line) for line in (self.path / "ledger.jsonl").read_text().splitlines()]

    @cached_property
    def files(self) -> dict[str, Any]:
        return {key: stored for receipt in self.receipts.values() for key, stored in receipt["files"].items()}

    @cached_property
    def keys(self) -> list[str]:
        return [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()]


@dataclass(frozen=True)
class Stores:
    """Stores of every kind, plain, compressed and in HDF5."""

    plain: Sequence[ZarrStore]
    compressed: Sequence[ZarrStore]
    hdf5: Sequence[Path]

    @property
    def zarr(self) -> list[ZarrStore]:
        return [*self.plain, *self.compressed]

    def of_kind(self, kind: str) -> list[ZarrStore]:
        return [store for store in self.zarr if store.kind == kind]


@pytest.fixture(scope="session")
def int8_images(tmp_path_factory: pytest.TempPathFactory, scenes_root: Path, image_encoder: HubImageEncoder) -> Path:
    """Three views of each image as int8; one image cannot be decoded."""
    from extract.image_job import ImageJobConfig, extract_images
    from extract.prepare import PrepareConfig, prepare

    root = tmp_path_factory.mktemp("format")
    shutil.copytree(scenes_root, root / "scenes")
    image = sorted((root / "scenes" / "images").iterdir())[3]
    image.write_bytes(image.read_bytes()[:-100])
    samples = prepare(PrepareConfig("scenes", root / "scenes", root)).path
    config = ImageJobConfig(samples, root, dtype="int8", views=("whole", "flip", "crop-0.5"), shard_rows=16)
    return extract_images(config, image_encoder).path


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_encoders: TinyEncoders) -> Path:
    """A LoRA adapter for the tiny image encoder."""
    from peft import LoraConfig, get_peft_model
    from transformers import Dinov2WithRegistersModel

    folder = tmp_path_factory.mktemp("format") / "adapter"
    model = Dinov2WithRegistersModel.from_pretrained(tiny_encoders.image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what its next version will not have
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a text encoder that reads padding."""
    from tests.extract.text_checkpoints import save_text_checkpoint

    folder = tmp_path_factory.mktemp("format") / "siglip"
    save_text_checkpoint("siglip2-fixed", folder)
    return folder


@pytest.fixture(scope="session")
def with_attention(tmp_path_factory: pytest.TempPathFactory, samples_path: Path, tiny_encoders: TinyEncoders) -> Path:
    """Layers and attention outputs in float32, of images that are cut to the input's shape."""
    from extract.encoders.image import load_image_encoder
    from extract.encoders.specs import ImageEncoderSpec
    from extract.image_job import ImageJobConfig, extract_images

    spec = ImageEncoderSpec(
        str(tiny_encoders.image), ("2+norm", "last"), ATTENTION_OUTPUTS, input_size=(64, 96), aspect="crop"
    )
    config = ImageJobConfig(samples_path, tmp_path_factory.mktemp("format"), dtype="float32")
    return extract_images(config, load_image_encoder(spec)).path


@pytest.fixture(scope="session")
def without_layers(
    tmp_path_factory: pytest.TempPathFactory, samples_path: Path, tiny_encoders: TinyEncoders, adapter: Path
) -> Path:
    """Attention outputs of an adapted encoder for windows and letterboxes in half precision, and no layer."""
    from extract.encoders.image import load_image_encoder
    from extract.encoders.specs import ImageEncoderSpec
    from extract.image_job import ImageJobConfig, extract_images

    spec = ImageEncoderSpec(
        str(tiny_encoders.image),
        (),
        ATTENTION_OUTPUTS,
        input_size=(64, 96),
        aspect="letterbox",
        precision="bfloat16",
        adapter=str(adapter),
    )
    views = ("whole", "crop-0.8", "windows-0.8-0.5")
    config = ImageJobConfig(samples_path, tmp_path_factory.mktemp("format"), views=views, shard_rows=32)
    return extract_images(config, load_image_encoder(spec)).path


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory, samples_path: Path) -> Path:
    """Samples of a fixed vocabulary; some pixels of some of them nobody labelled, and one has no mask."""
    opened = open_samples(samples_path)
    samples, image_dir = opened.samples, opened.image_dir
    assert image_dir is not None
    corner = np.zeros(samples.size_of(0), np.bool_)
    corner[:2, :3] = True
    ignored = [encode_mask(corner), *[b""] * (len(samples) - 1)]
    changed = replace(samples, ignored=ignored, classes=("circle", "square"), targets=[b"", *samples.targets[1:]])
    out = tmp_path_factory.mktemp("format")
    libraries = dict.fromkeys(("numpy", "pycocotools"), "1")
    return write_samples(out, changed, dataset="labelled", sources={}, image_dir=image_dir, libraries=libraries)[0]


@pytest.fixture(scope="session")
def stores(
    tmp_path_factory: pytest.TempPathFactory,
    samples_path: Path,
    labelled: Path,
    image_extraction: Extraction,
    prompt_extraction: Extraction,
    int8_images: Path,
    with_attention: Path,
    without_layers: Path,
    siglip: Path,
) -> Stores:
    from extract.encoders.specs import TextEncoderSpec
    from extract.encoders.text import load_text_encoder
    from extract.prompt_job import PromptJobConfig, extract_prompts

    out = tmp_path_factory.mktemp("format")
    padded = load_text_encoder(TextEncoderSpec(str(siglip)))
    float32 = extract_prompts(PromptJobConfig(samples_path, out, dtype="float32"), padded).path
    images = (image_extraction.path, int8_images, with_attention, without_layers)
    plain = (samples_path, labelled, *images, prompt_extraction.path, float32)
    few = (samples_path, prompt_extraction.path, int8_images)
    return Stores(
        [ZarrStore(path) for path in plain],
        [ZarrStore(convert_store(path, out / "zstd", "zarr", zstd_level=3)) for path in few],
        [convert_store(path, out / "hdf5", "hdf5") for path in (*few, image_extraction.path)],
    )


def objects_of(stores: Stores, heading: str) -> list[tuple[str, Any]]:
    """Every object that a table describes, with the place where it was found."""
    found: list[tuple[str, Any]] = []
    for store in stores.zarr:
        name, attributes = store.path.name, store.attributes
        if heading == "Root metadata":
            found.append((name, store.root))
        elif heading == "Group metadata":
            groups = [key for key, node in store.nodes.items() if node["node_type"] == "group"]
            found += [(f"{name}/{key}", store.json(f"{key}/zarr.json")) for key in groups]
        elif heading == "Attributes":
            found.append((name, attributes))
        elif heading == f"Identity of {KINDS[store.kind]}":
            found.append((name, store.identity))
        elif heading == {"image_features": "Image encoder", "prompt_features": "Text encoder"}.get(store.kind):
            found.append((name, store.identity["encoder"]))
        elif heading == ("Recorded of samples" if store.kind == "samples" else "Recorded of features"):
            found.append((name, attributes["recorded"]))
        elif heading == "The manifest":
            found.append((name, store.json("manifest.json")))
        elif heading == "Failures":
            found += [(f"the ledger of {name}", line) for line in store.ledger]
        for unit, receipt in store.receipts.items():
            where = f"receipt {unit} of {name}"
            if heading == "Receipts":
                found.append((where, receipt))
            elif heading == "Stored files":
                found += [(f"{where}, {key}", stored) for key, stored in receipt["files"].items()]
            elif heading == "Failures":
                found += [(where, failure) for failure in receipt["failures"]]
    return found


def arrays_of(stores: Stores, heading: str) -> list[FoundArrays]:
    """The arrays of every store that a table describes."""
    return [
        FoundArrays(store.path.name, store.identity, store.arrays)
        for store in stores.zarr
        if heading == f"Arrays of {KINDS[store.kind]}"
    ]


# Names


def test_every_table_of_the_document_is_compared_with_something() -> None:
    assert PAGE.tables.keys() == {*OBJECTS, *ARRAYS, *OTHERS}


@pytest.mark.parametrize("heading", OBJECTS)
def test_json_objects_have_the_fields_that_the_document_lists_and_no_others(stores: Stores, heading: str) -> None:
    objects = objects_of(stores, heading)
    assert objects
    assert object_faults(PAGE.tables[heading], objects, heading) == []


@pytest.mark.parametrize("heading", ARRAYS)
def test_arrays_are_those_that_the_document_lists_with_their_types_axes_shapes_and_chunks(
    stores: Stores, heading: str
) -> None:
    found = arrays_of(stores, heading)
    assert found
    assert array_faults(PAGE.tables[heading], found, heading) == []


@pytest.mark.parametrize("heading", OBJECTS)
def test_a_field_that_is_in_the_code_alone_or_in_the_document_alone_is_named(stores: Stores, heading: str) -> None:
    rows, objects = list(PAGE.tables[heading]), objects_of(stores, heading)
    for row in rows:
        without = [other for other in rows if other != row]
        assert any(f"holds `{name_of(row)}`" in fault for fault in object_faults(without, objects, heading)), row
    for kind in ("string", f"string{OPTIONAL}"):
        surplus = [*rows, {"field": "`surplus`", "type": f"`{kind}`"}]
        assert any("`surplus`, which" in fault for fault in object_faults(surplus, objects, heading))
    where, value = copy.deepcopy(objects[0])
    value["surplus"] = "?"
    assert f"{where} ({heading}) holds `surplus`, which the document does not list" in object_faults(
        rows, [(where, value), *objects], heading
    )


@pytest.mark.parametrize("heading", ARRAYS)
def test_an_array_that_is_in_the_code_alone_or_in_the_document_alone_is_named(stores: Stores, heading: str) -> None:
    rows, found = list(PAGE.tables[heading]), arrays_of(stores, heading)
    for row in rows:
        without = [other for other in rows if other != row]
        assert any("does not list" in fault for fault in array_faults(without, found, heading)), row
        for column, value in (("type", "`complex64`"), ("axes", "`axis`"), ("chunk", "7"), ("shape", "`(3)`")):
            changed = [{**other, column: value} if other == row else other for other in rows]
            assert array_faults(changed, found, heading), f"{column} of {name_of(row)}"
    surplus: Row = {**rows[-1], "array": "`surplus`", "when": "always"}
    assert any("lacks the array `surplus`" in fault for fault in array_faults([*rows, surplus], found, heading))


def test_array_names_are_spelled_as_the_document_says(stores: Stores) -> None:
    assert "are made of ASCII letters, digits, `_`, `-`, `+` and `.`." in PAGE.text
    names = {name for store in stores.zarr for name in store.arrays}
    assert "features/2+norm" in names
    assert all(re.fullmatch(r"[A-Za-z0-9_.+-]+(/[A-Za-z0-9_.+-]+)*", name) for name in names)


def test_field_types_are_those_that_the_document_explains() -> None:
    explained = {kind for row in PAGE.tables["Field types"] for cell in codes(row["type"]) for kind in cell.split(", ")}
    assert OPTIONAL.removeprefix(", ") in explained
    for heading in OBJECTS:
        for row in PAGE.tables[heading]:
            kind = row["type"].strip("`").removesuffix(OPTIONAL)
            while " of " in kind:
                container, _, kind = kind.partition(" of ")
                assert f"{container} of T" in explained
            assert "T or U" in explained
            for either in kind.split(" or "):
                assert either in explained or fits(either, json.loads(either)), kind


def test_stores_are_of_the_kinds_that_the_document_lists(stores: Stores) -> None:
    listed = {name_of(row) for row in PAGE.tables["Kinds of store"]}
    assert listed == set(get_args(StoreKind)) == {store.kind for store in stores.zarr} == set(KINDS)


def test_a_store_is_named_after_its_kind_and_fingerprint(stores: Stores) -> None:
    (digits,) = re.findall(r"are the first (\d+) digits", PAGE.text)
    for store in stores.zarr:
        assert store.path.name == f"{store.kind}-{store.attributes['fingerprint'][: int(digits)]}.zarr"
    stems = {store.path.stem for store in stores.zarr}
    assert {path.suffix for path in stores.hdf5} == {".h5"}
    assert {path.stem for path in stores.hdf5} <= stems


def test_links_inside_the_document_lead_to_a_heading() -> None:
    headings = re.findall(r"^#+ (.*)$", PAGE.text, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]*)\)", PAGE.text))
    assert links
    assert links <= slugs


def test_the_document_describes_the_version_that_the_code_writes() -> None:
    assert f"This page describes schema version `{SCHEMA_VERSION}`." in PAGE.text


# Files, units and shards


def shards_of(metadata: Mapping[str, Any]) -> list[str]:
    """The files of an array's shards, as the document names them."""
    rows, rank = metadata["shape"][0], len(metadata["shape"])
    shard_rows = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    return [".".join(["c", str(shard)] + ["0"] * (rank - 1)) for shard in range(-(-rows // shard_rows))]


def groups_of(store: ZarrStore) -> set[str]:
    return {str(parent) for name in store.arrays for parent in PurePosixPath(name).parents} - {"."}


def units_of(store: ZarrStore) -> dict[str, set[str]]:
    """The files of every unit of a store, by the rules of the document's table of units."""
    whole = {name_of(row) for row in PAGE.tables[f"Arrays of {KINDS[store.kind]}"] if row["chunk"] == "whole"}
    whole |= {name for name in store.arrays if name.startswith("sample/tag/")}
    units = {
        "static": {f"{name}/{key}" for name in whole & store.arrays.keys() for key in shards_of(store.arrays[name])}
    }
    if store.kind == "image_features":
        for name in store.arrays.keys() - whole:
            for unit, key in enumerate(shards_of(store.arrays[name])):
                units.setdefault(f"{unit:06d}", set()).add(f"{name}/{key}")
    elif store.kind == "prompt_features":
        each, step = store.identity["unit_prompts"], store.identity["shard_tokens"]
        offsets = zarr.open_array(store.path / "offsets", mode="r")[:]
        for unit, key in enumerate(shards_of(store.arrays["pooled"])):
            first, last = offsets[unit * each], offsets[min((unit + 1) * each, len(offsets) - 1)]
            begun = [
                shard for number, shard in enumerate(shards_of(store.arrays["tokens"])) if first <= number * step < last
            ]
            units[f"{unit:06d}"] = {f"pooled/{key}", *(f"tokens/{shard}" for shard in begun)}
    return units


def test_a_unit_owns_the_shards_that_the_document_gives_it(stores: Stores) -> None:
    listed = {(codes(row["unit"])[0], row["of"]) for row in PAGE.tables["Units"]}
    assert listed == {("static", "every store"), ("<number>", "image features"), ("<number>", "prompt features")}
    for store in stores.zarr:
        assert {unit: set(receipt["files"]) for unit, receipt in store.receipts.items()} == units_of(store)
        assert all(receipt["unit"] == unit for unit, receipt in store.receipts.items())
        each = store.identity.get("shard_rows", store.identity.get("unit_prompts"))
        num_rows = store.arrays["valid" if store.kind == "image_features" else "pooled"]["shape"][0] if each else 0
        for unit, receipt in store.receipts.items():
            first = 0 if unit == "static" else int(unit) * each
            assert receipt["rows"] == ([0, 0] if unit == "static" else [first, min(first + each, num_rows)])


def files_by_rule(store: ZarrStore, pattern: str) -> set[str]:
    """The keys of a store that a row of the table of files stands for."""
    names = {"<array>": store.arrays, "<group>": groups_of(store), "<unit>": units_of(store)}
    if pattern == "<array>/c.<place>":
        return {f"{name}/{key}" for name, metadata in store.arrays.items() for key in shards_of(metadata)}
    (placeholder,) = re.findall("<.*>", pattern) or [""]
    return {pattern.replace(placeholder, name) for name in names[placeholder]} if placeholder else {pattern}


def test_a_folder_holds_the_files_that_the_document_lists_and_no_others(stores: Stores) -> None:
    patterns = [name_of(row) for row in PAGE.tables["Files of a store"]]
    for store in stores.zarr:
        assert (
            name_faults(store.keys, set().union(*(files_by_rule(store, each) for each in patterns)), str(store)) == []
        )
        for pattern in patterns:
            rest = set().union(*(files_by_rule(store, each) for each in patterns if each != pattern))
            assert name_faults(store.keys, rest, str(store)), f"{pattern} could go unseen"


def test_receipts_and_manifest_say_what_lies_there(stores: Stores) -> None:
    for store in stores.zarr:
        for key, stored in store.files.items():
            data = (store.path / key).read_bytes()
            assert stored == {"num_bytes": len(data), "xxh3_128": xxhash.xxh3_128(data, seed=0).hexdigest()}
        digests = {key: stored["xxh3_128"] for key, stored in store.files.items()}
        assert store.json("manifest.json") == {
            "fingerprint": store.attributes["fingerprint"],
            "num_units": len(store.receipts),
            "num_files": len(store.files),
            "num_bytes": sum(stored["num_bytes"] for stored in store.files.values()),
            "num_failures": len(store.ledger),
            "digest": sha256_of(digests),
        }


def test_the_ledger_repeats_the_failures_of_the_receipts_in_order(stores: Stores, int8_images: Path) -> None:
    for store in stores.zarr:
        failures = [failure for receipt in store.receipts.values() for failure in receipt["failures"]]
        assert store.ledger == sorted(failures, key=lambda failure: failure["row"])
        lines = b"".join(spell(failure) + b"\n" for failure in store.ledger)
        assert (store.path / "ledger.jsonl").read_bytes() == lines
    assert [failure["row"] for failure in ZarrStore(int8_images).ledger] == [9, 10, 11]


def metadata_by_rule(example: Mapping[str, Any], places: Sequence[str], layout: Mapping[str, Any]) -> dict[str, Any]:
    """The document's example of an array's metadata with another array's values in the places that are listed."""
    metadata = copy.deepcopy(dict(example))
    for place in places:
        *path, last = place.split(".")
        node: Any = metadata
        for step in path:
            node = node[int(step) if isinstance(node, list) else step]
        assert last in node, f"the document lists {place}, which its own example lacks"
        node[last] = layout[place]
    return metadata


def layout_of(name: str, store: ZarrStore) -> dict[str, Any]:
    """What stands in the places that differ from array to array, from the array as zarr-python sees it."""
    array = zarr.open_array(store.path / name, mode="r")
    fill_values = {name_of(row): json.loads(row["fill value"].strip("`")) for row in PAGE.tables["Data types"]}
    row_shape = [max(1, length) for length in array.shape[1:]]
    assert array.shards is not None
    return {
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid.configuration.chunk_shape": [array.shards[0], *row_shape],
        "fill_value": fill_values[array.dtype.name],
        "codecs.0.configuration.chunk_shape": [array.chunks[0], *row_shape],
        "dimension_names": list(store.arrays[name]["dimension_names"]),
    }


def test_array_metadata_is_the_documents_example_with_other_values_in_the_places_it_lists(stores: Stores) -> None:
    example, zstd = (json.loads(text) for _, text in PAGE.blocks["Array metadata"])
    places = [name_of(row) for row in PAGE.tables["Array metadata"]]
    differing = set()
    for store in stores.zarr:
        template = copy.deepcopy(example)
        if store in stores.compressed:
            template["codecs"][0]["configuration"]["codecs"].insert(1, zstd)
        for name, metadata in store.arrays.items():
            layout = layout_of(name, store)
            expected = metadata_by_rule(template, places, layout)
            assert spell(metadata) == spell(expected), f"{store.path.name}: {name}"
            assert spell(store.json(f"{name}/zarr.json")) == spell(expected)
            for place in places:
                rest = [other for other in places if other != place]
                if spell(metadata_by_rule(template, rest, layout)) != spell(expected):
                    differing.add(place)
    assert differing == set(places)


def test_data_types_are_those_that_the_document_lists(stores: Stores) -> None:
    used = {metadata["data_type"] for store in stores.zarr for metadata in store.arrays.values()}
    assert [int(row["bytes"]) for row in PAGE.tables["Data types"]] == [
        np.dtype(name_of(row)).itemsize for row in PAGE.tables["Data types"]
    ]
    assert {name_of(row) for row in PAGE.tables["Data types"]} == used


def test_the_worked_example_of_a_shard_is_what_the_code_writes(tmp_path: Path) -> None:
    example = json.loads(PAGE.blocks["Array metadata"][0][1])
    layout = ArrayLayout("example", (3, 2), np.dtype(np.uint8), chunk_rows=1, shard_rows=4, axes=("row", "column"))
    assert layout.to_metadata() == example
    values = np.array([[0, 1], [10, 11], [20, 21]], np.uint8)
    dump = parse_hexdump(PAGE.block("Shards", "hexdump"))
    assert bytes(encode_shard(values, layout)) == dump
    (tmp_path / "example").mkdir()
    (tmp_path / "example" / "c.0.0").write_bytes(dump)
    (tmp_path / "example" / "zarr.json").write_text(json.dumps(example))
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "example", mode="r")[:], values)
    (tmp_path / "zarr.json").write_text(json.dumps({"consolidated_metadata": {"metadata": {"example": example}}}))
    np.testing.assert_array_equal(reader_of_the_document()(tmp_path, "example"), values)


def test_a_chunk_that_is_cut_short_is_filled_and_what_lies_past_the_end_is_marked(stores: Stores) -> None:
    images = next(store for store in stores.plain if store.identity.get("dtype") == "int8")
    data = (images.path / "cls/last" / "c.4.0").read_bytes()  # rows 64 to 71, in a chunk of 16
    assert len(data) == 16 * 96 * 2 + 4 + 16 + 4
    assert not any(data[8 * 96 * 2 : 16 * 96 * 2])
    index = struct.unpack("<32Q", (images.path / "features/last" / "c.4.0.0.0").read_bytes()[-260:-4])
    assert index[14:18] == (7 * 2308, 2308, 2**64 - 1, 2**64 - 1)
    assert set(index[16:]) == {2**64 - 1}


def test_crc32c_is_the_one_that_the_document_names() -> None:
    assert f"`{crc32c(b'123456789'):08x}`" in PAGE.text


# Digests


def spell(value: Any) -> bytes:
    """Canonical JSON, by the line of Python in the document."""
    (line,) = re.findall(r"^In Python: `(.*)`\.$", PAGE.text, re.MULTILINE)
    return eval(line, {"json": json, "value": value})


def sha256_of(value: Any) -> str:
    return hashlib.sha256(spell(value)).hexdigest()


def digest_of_list(strings: Sequence[str]) -> str:
    return hashlib.sha256(b"".join(spell(string) + b"\n" for string in strings)).hexdigest()


def test_the_examples_of_canonical_json_hold() -> None:
    for row in PAGE.tables["Canonical JSON"]:
        value, canonical = json.loads(row["JSON"].strip("`")), row["canonical"].strip("`").encode()
        assert canonical_json(value) == spell(value) == canonical


def test_the_worked_example_of_a_fingerprint_holds() -> None:
    value = json.loads(PAGE.block("Fingerprints", "json"))
    canonical, digest, name = PAGE.block("Fingerprints", "text").splitlines()
    assert canonical_json(value).decode() == canonical
    assert hashlib.sha256(canonical.encode()).hexdigest() == digest
    assert name == f"{value['kind']}-{digest[:12]}.zarr"
    assert value["schema_version"] == SCHEMA_VERSION


def test_fingerprints_and_digests_follow_from_what_the_document_says_they_cover(stores: Stores) -> None:
    for store in stores.zarr:
        about = store.attributes
        covered = {key: about[key] for key in ("schema_version", "kind", "identity")}
        assert about["fingerprint"] == sha256_of(covered)
        assert about["metadata_sha256"] == sha256_of(store.nodes)
        assert store.nodes.keys() == {*store.arrays, *groups_of(store)}
    for store in stores.of_kind("samples"):
        arrays = {name: zarr.open_array(store.path / name, mode="r")[...] for name in store.arrays}
        assert store.identity["arrays"] == {
            name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in arrays.items()
        }
        assert store.identity["tags"].keys() == {
            name.removeprefix("sample/tag/") for name in arrays if name.startswith("sample/tag/")
        }
        assert all(
            names == sorted(set(names)) for names in (store.identity["splits"], *store.identity["tags"].values())
        )
    for path in (store.path for store in stores.of_kind("prompt_features")):
        opened = open_store(path)
        assert opened.header.identity["prompts"] == digest_of_list(read_strings(opened, "prompt/text"))
    for path in (store.path for store in stores.of_kind("image_features")):
        opened = open_store(path)
        images, sizes = ImageFeatures(opened), opened.read("original_size").tolist()
        lines = [
            f"{images.ids[rows[0]]} {sizes[rows[0]][0]}x{sizes[rows[0]][1]} {images.sha256[rows[0]]}"
            for rows in rows_by_image(images)
        ]
        assert opened.header.identity["images"] == digest_of_list(lines)


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> Any:
    """Names, types, lengths and bytes of tensors, hashed as the document says."""
    running = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.numpy()
        running.update(f"{name} torch.{values.dtype.name} {values.shape}\n".encode() + values.tobytes())
    return running


def test_the_digests_of_encoders_follow_from_their_checkpoints(
    stores: Stores, tiny_encoders: TinyEncoders, siglip: Path
) -> None:
    import transformers

    folders = {
        "Dinov2WithRegistersModel": tiny_encoders.image,
        "CLIPTextModelWithProjection": tiny_encoders.text,
        "SiglipTextModel": siglip,
    }
    encoders = [store.identity["encoder"] for store in stores.zarr if store.kind != "samples"]
    assert {encoder["class"] for encoder in encoders} == folders.keys()
    silent = ("architectures", "dtype", "torch_dtype", "transformers_version")

    def loud(config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        return {key: loud(value) for key, value in config.items() if key not in silent and not key.startswith("_")}

    for name, folder in folders.items():
        config = loud(json.loads((folder / "config.json").read_bytes()))
        weights = digest_of_tensors(getattr(transformers, name).from_pretrained(folder).state_dict()).hexdigest()
        for encoder in encoders:
            if encoder["class"] == name:
                assert encoder["weights"] == weights
                assert encoder["config"] == config


def test_the_digest_of_an_adapter_follows_from_its_folder(stores: Stores, adapter: Path) -> None:
    from safetensors.torch import load_file

    section = PAGE.text.split("### Encoder digests")[1].split("###")[0]
    silent = codes(section.split("This lacks the fields")[1].split(", and lists")[0])
    settings = json.loads((adapter / "adapter_config.json").read_bytes())
    assert len(silent) == len({*silent} & settings.keys()) > 1
    kept = {key: value for key, value in settings.items() if key not in silent}
    kept["target_modules"] = sorted(kept["target_modules"])
    running = digest_of_tensors(load_file(adapter / "adapter_model.safetensors"))
    running.update(spell(kept))
    found = [(store.path.name, store.identity["encoder"]["adapter"]) for store in stores.of_kind("image_features")]
    assert {digest for _, digest in found} == {None, running.hexdigest()}
    for store in stores.of_kind("image_features"):
        adapted = store.identity["encoder"]["adapter"] is not None
        assert ("adapter" in store.attributes["recorded"]["paths"]) == adapted


def test_the_digest_of_a_tokenizer_follows_from_its_checkpoint(
    stores: Stores, tiny_encoders: TinyEncoders, siglip: Path
) -> None:
    for store in stores.of_kind("prompt_features"):
        encoder = store.identity["encoder"]
        lower_cases = encoder["class"] == "SiglipTextModel"
        folder = siglip if lower_cases else tiny_encoders.text
        rules = json.loads((folder / "tokenizer.json").read_bytes())
        kept = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
        if lower_cases:
            before = [] if kept["normalizer"] is None else [kept["normalizer"]]
            kept["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *before]}
        expected = {"rules": kept, "side": "right", "split_special_tokens": False}
        assert encoder["tokenizer"]["sha256"] == sha256_of(expected)
        assert ("lower_case" in encoder["tokenizer"]) == ("padding" in encoder["tokenizer"]) == lower_cases


# Masks, views and int8


def test_the_example_of_a_target_mask_holds() -> None:
    *rows, runs, counts = PAGE.block("Target masks", "mask").splitlines()
    mask = np.array([[cell == "1" for cell in row.split()] for row in rows])
    assert encode_mask(mask).decode() == counts.removeprefix("bytes ")
    changes = np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=False)).tolist()
    assert np.diff([0, *changes, mask.size]).tolist() == [int(run) for run in runs.split()[1:]]


def test_the_examples_of_views_hold() -> None:
    assert str(PADDING_RGB) in PAGE.text
    assert f"No image has more than {MAX_WINDOWS} of them." in PAGE.text
    digest = hashlib.sha256(b"").hexdigest()
    assert f"`{digest}`" in PAGE.text
    rows = PAGE.tables["Views"]
    ((height, width),) = {tuple(numbers(row["size"])) for row in rows}
    specs = list(dict.fromkeys(name_of(row) for row in rows))
    assert [int(row["row"]) for row in rows] == [*range(len(rows))]
    assert [numbers(row["box and flip"]) for row in rows] == [
        list(view.to_row()) for view in make_views(specs, (height, width), digest)
    ]


def test_the_examples_of_what_an_encoder_sees_hold() -> None:
    rows = PAGE.tables["What the encoder sees"]
    assert {codes(row["aspect"])[0] for row in rows} == set(ASPECTS)
    for row in rows:
        height, width = numbers(row["input size"])
        aspect: Any = codes(row["aspect"])[0]
        fitted = fit_view(View.from_row(numbers(row["view"])), (height, width), aspect)
        assert numbers(row["row of `view`"]) == list(fitted.to_row())


def numbers(cell: str) -> list[int]:
    return [int(number) for number in cell.split(",")]


def rows_by_image(images: ImageFeatures) -> list[list[int]]:
    """The rows of each image: a new one begins where the id changes."""
    groups: list[list[int]] = []
    for row, image in enumerate(images.ids):
        if row == 0 or image != images.ids[row - 1]:
            groups.append([])
        groups[-1].append(row)
    return groups


def test_rows_are_the_views_that_the_identity_names_as_the_encoder_sees_them(stores: Stores) -> None:
    seen = set()
    for path in (store.path for store in stores.of_kind("image_features")):
        opened = open_store(path)
        images, sizes, identity = ImageFeatures(opened), opened.read("original_size").tolist(), opened.header.identity
        preprocessing = identity["encoder"]["preprocessing"]
        height, width = preprocessing["input_size"]
        groups = rows_by_image(images)
        assert len({images.ids[rows[0]] for rows in groups}) == len(groups) == 24
        for number, rows in enumerate(groups):
            asked = make_views(identity["views"], tuple(sizes[rows[0]]), images.sha256[rows[0]])
            shown = [fit_view(view, (height, width), preprocessing["aspect"]) for view in asked]
            assert [images.views[row] for row in rows] == shown
            assert images.rows_of_image(number) == range(rows[0], rows[-1] + 1)
        seen.add((preprocessing["aspect"], len({len(rows) for rows in groups}) > 1))
    assert {aspect for aspect, _ in seen} == set(ASPECTS)
    assert {uneven for _, uneven in seen} == {False, True}, "images with unequal numbers of windows, too"


def test_attention_outputs_are_pooled_as_the_document_says(with_attention: Path) -> None:
    images = ImageFeatures(open_store(with_attention))
    logits, heads, mean = (images.attention(name).read() for name in ("logits", "head_tokens", "mean_token"))
    patches = images.features("last").read().reshape(len(logits), -1, heads.shape[-1])
    flat = logits.reshape(*logits.shape[:2], -1).astype(np.float64)

    def pool(weighing: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = np.exp(weighing - weighing.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True)) @ patches / patches.shape[1]

    np.testing.assert_allclose(heads, pool(flat), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mean, pool(flat.mean(1, keepdims=True))[:, 0], rtol=1e-4, atol=1e-6)


def test_int8_tokens_and_scales_follow_the_documents_rule() -> None:
    tokens = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32) * np.float32(3)
    tokens[0] = 0
    values, scales = quantize(tokens)
    for token, value, scale in zip(tokens, values, scales, strict=True):
        exact = np.abs(token).max() / np.float32(127)
        assert scale >= exact
        assert scale == 0 or np.nextafter(scale, np.float16(0)) < exact
        expected = np.rint(token / np.float32(scale)) if scale else np.zeros(8)
        np.testing.assert_array_equal(value, expected)
        assert (np.abs(value * np.float32(scale) - token) <= np.float32(scale) / 2 * (1 + 1e-5)).all()


def test_a_row_that_is_not_valid_holds_zeros_and_every_other_value_is_finite(stores: Stores, int8_images: Path) -> None:
    failed = {failure["row"] for failure in ZarrStore(int8_images).ledger}
    opened = open_store(int8_images)
    assert set(np.flatnonzero(~opened.read("valid")).tolist()) == failed
    for name in opened.layouts:
        if name.startswith(("features/", "scale/", "cls/", "attention/")):
            values = opened.read(name)
            assert not values[sorted(failed)].any()
            assert np.isfinite(values).all()


# HDF5


def datasets_by_rule(store: ZarrStore, pattern: str) -> set[str]:
    """The datasets that a row of the table stands for, for a store that is the same in a folder."""
    receipts = {f"receipts/{unit}.json" for unit in store.receipts}
    keys = {"zarr.json", "ledger.jsonl", "manifest.json", *receipts}
    names = {"<array>": set(store.arrays), "<key>": keys}
    (placeholder,) = re.findall("<.*>", pattern)
    return {pattern.replace(placeholder, name) for name in names[placeholder]}


def test_an_hdf5_file_holds_the_datasets_that_the_document_lists_and_no_others(stores: Stores) -> None:
    rows = {name_of(row): row for row in PAGE.tables["Datasets"]}
    plain = {store.path.stem: store for store in stores.plain}
    for path in stores.hdf5:
        same = plain[path.stem]
        rule_of = {name: rule for rule in rows for name in datasets_by_rule(same, rule)}
        with h5py.File(path) as file:
            nodes = nodes_of(file)
            found = {name: node for name, node in nodes.items() if isinstance(node, h5py.Dataset)}
            assert name_faults(found, rule_of, path.name) == []
            assert not any(node.attrs for node in [file, *nodes.values()] if isinstance(node, h5py.Group))
            for name, dataset in found.items():
                row = rows[rule_of[name]]
                metadata = same.arrays.get(name, {})
                kind = metadata["data_type"] if row["type"] == "the array's" else codes(row["type"])[0]
                labels = metadata["dimension_names"] if row["labels"] == "its axes" else [""] * dataset.ndim
                given = [] if row["attributes"] == "none" else codes(row["attributes"])
                assert dataset.dtype.name == kind, name
                assert [axis.label for axis in dataset.dims] == labels, name
                assert sorted(set(dataset.attrs) - {"DIMENSION_LABELS"}) == given, name
                assert dataset.chunks is None, name
                assert dataset.id.get_offset() is not None or not dataset.size, name


def test_the_checksums_of_an_hdf5_file_are_those_the_document_says(stores: Stores) -> None:
    for path in stores.hdf5:
        with h5py.File(path) as file:
            root = json.loads(file["headstart/files/zarr.json"][()].tobytes())
            for name, metadata in root["consolidated_metadata"]["metadata"].items():
                if metadata["node_type"] == "array":
                    values, chunk_rows = file[name][()], metadata["codecs"][0]["configuration"]["chunk_shape"][0]
                    chunks = [values[start : start + chunk_rows] for start in range(0, len(values), chunk_rows)]
                    assert file[f"headstart/crc32c/{name}"][()].tolist() == [crc32c(part.tobytes()) for part in chunks]
            for name, node in nodes_of(file["headstart/files"]).items():
                if isinstance(node, h5py.Dataset):
                    assert node.attrs["crc32c"].dtype == np.uint32
                    assert node.attrs["crc32c"] == crc32c(node[()].tobytes()), name


def test_an_hdf5_file_has_the_receipts_and_the_manifest_of_the_plain_store(stores: Stores) -> None:
    plain = {store.path.stem: store for store in stores.plain}
    for path in stores.hdf5:
        same = plain[path.stem]
        with h5py.File(path) as file:
            files = file["headstart/files"]
            assert json.loads(files["manifest.json"][()].tobytes()) == same.json("manifest.json")
            for unit, receipt in same.receipts.items():
                assert json.loads(files[f"receipts/{unit}.json"][()].tobytes()) == receipt


def nodes_of(group: Any) -> dict[str, Any]:
    nodes: dict[str, Any] = {}
    group.visititems(lambda name, node: nodes.update({name: node}))
    return nodes


# Versions


@pytest.fixture
def small_store(tmp_path: Path, int8_images: Path) -> ZarrStore:
    """A copy of a store with failures, to be spoilt."""
    shutil.copytree(int8_images, tmp_path / int8_images.name)
    return ZarrStore(tmp_path / int8_images.name)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def add_unknown_field(store: ZarrStore, where: str) -> None:
    """Give one object of a store, and the digests above it, a field that no document lists."""
    receipt = store.path / "receipts" / "000000.json"
    if where == "receipt":
        edit(receipt, lambda value: value.update(surplus=1))
    elif where == "stored file":
        edit(receipt, lambda value: value["files"]["valid/c.0"].update(surplus=1))
    elif where == "failure":
        edit(receipt, lambda value: value["failures"][0].update(surplus=1))
    elif where == "manifest":
        edit(store.path / "manifest.json", lambda value: value.update(surplus=1))
    else:
        root = store.root
        about, nodes = store.attributes, store.nodes
        target = {"attributes": about, "recorded": about["recorded"], "identity": about["identity"]}
        target.get(where, nodes["valid"])["surplus"] = 1
        about["metadata_sha256"] = sha256_of(nodes)
        about["fingerprint"] = sha256_of({key: about[key] for key in ("schema_version", "kind", "identity")})
        (store.path / "zarr.json").write_text(json.dumps(root))
        edit(store.path / "manifest.json", lambda value: value.update(fingerprint=about["fingerprint"]))


def test_the_document_says_of_every_object_what_becomes_of_an_unknown_field() -> None:
    objects = {"attributes", "identity", "recorded", "receipt", "stored file", "failure", "manifest", "array metadata"}
    assert {name_of(row) for row in PAGE.tables["Versions"]} == objects


@pytest.mark.parametrize("row", PAGE.tables["Versions"], ids=name_of)
def test_a_field_that_the_document_does_not_list_is_read_or_refused_as_it_says(
    small_store: ZarrStore, row: Row
) -> None:
    open_store(small_store.path).close()
    add_unknown_field(small_store, name_of(row))
    if row["with an unknown field"] == "refused":
        with pytest.raises(DamagedStoreError):
            open_store(small_store.path)
    else:
        assert row["with an unknown field"].startswith("read, ")
        assert open_store(small_store.path).read("valid").shape == (72,)


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_a_store_of_another_version_is_refused_by_name(small_store: ZarrStore, version: int) -> None:
    edit(small_store.path / "zarr.json", lambda root: root["attributes"]["headstart"].update(schema_version=version))
    with pytest.raises(UsageError, match=rf"schema version {version}; this one reads {SCHEMA_VERSION}"):
        open_store(small_store.path)


# Snippets


def snippet(heading: str, **names: Any) -> dict[str, Any]:
    """The names that a snippet of the document leaves behind."""
    exec(compile(PAGE.block(heading, "python"), heading, "exec"), names)
    return names


def reader_of_the_document() -> Callable[[Path, str], Any]:
    return snippet("With NumPy and a crc32c")["read_array"]


def assert_snippet_read(read: Mapping[str, Any], store: Store) -> None:
    images = ImageFeatures(store)
    layer = images.layers[-1]
    grid = images.features(layer).read([0])[0]
    if (scale := images.scale(layer)) is not None:
        grid = grid.astype(np.float32) * scale.read([0])[0].astype(np.float32)[..., None]
    np.testing.assert_array_equal(read["grid"], grid)
    assert read["grid"].dtype == grid.dtype
    np.testing.assert_array_equal(read["valid"], images.valid)
    assert read["ids"] == images.ids


def test_the_snippet_for_zarr_python_reads_every_image_store_with_layers_in_a_folder(stores: Stores) -> None:
    with_layers = [store for store in stores.of_kind("image_features") if store.identity["outputs"]["layers"]]
    assert len(with_layers) == len(stores.of_kind("image_features")) - 1
    for store in with_layers:
        assert_snippet_read(snippet("With zarr-python", store=store.path), open_store(store.path))


def test_the_snippet_for_h5py_reads_every_image_store_in_hdf5(stores: Stores) -> None:
    paths = [path for path in stores.hdf5 if path.name.startswith("image_features")]
    assert len(paths) == 2
    for path in paths:
        assert_snippet_read(snippet("With h5py", store=path), open_store(path))


def test_the_reader_of_the_document_reads_every_array_of_every_plain_store(stores: Stores) -> None:
    read_array = reader_of_the_document()
    for store in stores.plain:
        opened = open_store(store.path)
        for name in opened.layouts:
            values = read_array(store.path, name)
            np.testing.assert_array_equal(values, opened.read(name))
            assert values.dtype == opened.layouts[name].dtype
        opened.close()


def test_the_reader_of_the_document_notices_a_flipped_bit(small_store: ZarrStore) -> None:
    shard = small_store.path / "features" / "last" / "c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    for place in (5, len(data) - 9):
        spoilt = data.copy()
        spoilt[place] ^= 1
        shard.write_bytes(spoilt)
        with pytest.raises(ValueError, match="checksum"):
            reader_of_the_document()(small_store.path, "features/last")
