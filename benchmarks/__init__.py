"""Measurements of headstart beside its peers, each in one run on one machine. `python -m benchmarks.<name> --help`.

Not installed with the package; the extra `bench` names the peers, and no_deps.txt those that pip cannot install beside
headstart's own dependencies.
"""
