"""The command line. It only parses, runs a command and prints; with `--json`, stdout is one JSON object.

Exit codes: 0 done, 1 done and found wanting, 2 the user's mistake, 3 a fault of ours, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tyro

from cache_schema.errors import UsageError
from headstart.bench_commands import BENCH_COMMANDS
from headstart.cache_commands import CACHE_COMMANDS
from headstart.command import Command, Wanting
from headstart.commands import COMMANDS
from headstart.prepare_commands import printable
from headstart.processes import is_first_process
from headstart.samples_show import SAMPLES_COMMANDS

DONE, WANTING, MISTAKE, FAULT, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143

_USERS_ERRNOS = {
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EROFS,
    errno.ENOSPC,
}
"""What the system answers where a place was named that cannot be read or written."""

_REMOTE_LIBRARIES = {"botocore", "aiohttp", "gcsfs", "adlfs", "azure", "google"}
"""Libraries that speak with remote stores: what they raise is about addresses and credentials."""

DESCRIPTION = """\
Encode every image and prompt once; train text-prompted segmentation heads on the cached features in minutes.

The road: prepare (a dataset -> samples), extract (samples -> features), train (features -> a head), evaluate (a head
-> numbers and a report), predict (a head and a picture -> masks). `headstart demo` walks all of it.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `headstart` command."""
    code = run(sys.argv[1:] if argv is None else argv)
    if _is_in_a_group():  # a command failed; to leave the others might wait for them, and to end within may abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Parse and run one command; return its exit code."""
    try:
        command: Command = _make_app().cli(
            prog="headstart",
            description=DESCRIPTION,
            args=list(argv),
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
        )
    except BrokenPipeError:  # whoever read the help has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except SystemExit as parsed:  # tyro has printed its help, or what is wrong with the arguments
        return parsed.code if isinstance(parsed.code, int) else MISTAKE
    return _run(command)


def _make_app() -> tyro.extras.SubcommandApp:
    app = _make_group(COMMANDS)
    app.command(
        _make_group(SAMPLES_COMMANDS), name="samples", help="Look into samples stores: statistics and pictures."
    )
    app.command(_make_group(BENCH_COMMANDS), name="bench", help="Compare heads under one budget.")
    cache = _make_group(CACHE_COMMANDS)
    app.command(cache, name="cache", help="Look into stores, check, repair, convert and clear them.")
    return app


def _make_group(commands: Mapping[str, type[Command]]) -> tyro.extras.SubcommandApp:
    group = tyro.extras.SubcommandApp()
    for name, command in commands.items():
        group.command(name=name)(command)
    return group


def _run(command: Command) -> int:
    _quiet_libraries()
    try:
        _require_own_evaluate()
        with _stopped_by_sigterm(), _one_of_several_processes(), contextlib.ExitStack() as stack:
            quiet = None if is_first_process() else stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(quiet or (sys.stderr if command.json else sys.stdout)))
            result = command.run()
    except UsageError as mistake:
        print(f"headstart: {printable(str(mistake))}", file=sys.stderr)
        return MISTAKE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for {error.filename}" if error.filename else ""
            remedy = "make room and run the same command again to go on."
            print(f"headstart: there is no room{where}; {remedy}", file=sys.stderr)
            return MISTAKE
        if error.filename is None or error.errno not in _USERS_ERRNOS:
            return _report_fault()
        print(f"headstart: {error.filename}: {error.strerror}; name another place, or mend this one.", file=sys.stderr)
        return MISTAKE
    except Terminated:
        print("\nheadstart: terminated; run the same command again to go on.", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("\nheadstart: interrupted; run the same command again to go on.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001  the outermost frame: whatever was not foreseen is ours to mend
        if type(error).__module__.partition(".")[0] not in _REMOTE_LIBRARIES:
            return _report_fault()
        print(f"headstart: a remote store cannot be reached ({error}); mend address or credentials.", file=sys.stderr)
        return MISTAKE
    if command.json and is_first_process():
        print(json.dumps(result, indent=1, sort_keys=True))
    return WANTING if isinstance(result, Wanting) else DONE


@contextlib.contextmanager
def _one_of_several_processes() -> Iterator[None]:
    """Leave the group of processes at the end: one that is still in it as Python shuts down may abort."""
    yield
    if _is_in_a_group():
        sys.modules["torch.distributed"].destroy_process_group()


def _is_in_a_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler sends it before it kills: it ends a command the way Ctrl-C does."""


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the command, so that what is being written is finished and nothing half is left."""

    def stop(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report_fault() -> int:
    traceback.print_exc()
    print("headstart: this is a fault of ours, not yours; please report it with the lines above.", file=sys.stderr)
    return FAULT


def _require_own_evaluate() -> None:
    """Hugging Face has a package named `evaluate` too; whichever is found first hides the other."""
    found = importlib.util.find_spec("evaluate")
    home = Path(__file__).parent.parent
    if found is None or found.origin is None or Path(found.origin).parent.parent != home:
        where = found.origin if found is not None else "nowhere"
        raise UsageError(
            f"another package named 'evaluate' stands before ours ({where}); give headstart a virtual environment of "
            "its own, as `make demo` does."
        )


def _quiet_libraries() -> None:
    """Leave the screen to our own progress bars."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


if __name__ == "__main__":
    main()
