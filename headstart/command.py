"""What every command is, and the kinds of options that several share."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from tyro.conf import arg

Place = Annotated[str, arg(metavar="PATH|URL")]
"""Where stores lie: a path of this machine, or s3://bucket/folder and the like."""

Json = Annotated[bool, arg(help="Print one JSON object on stdout and everything else on stderr.")]


class Command(Protocol):
    """One parsed command line."""

    @property
    def json(self) -> bool: ...

    def run(self) -> Any:
        """Do the work, print for people, return what `--json` prints."""
        ...


class Wanting(dict[str, Any]):
    """A result that is found wanting: printed like any other, and exit code 1."""
