"""What a cache is: schema, fingerprints, stores and shards. A leaf: numpy and pycocotools, never torch."""

SCHEMA_VERSION = 3
"""Raised whenever a store written before could be misread; a store of another version is refused by name."""
