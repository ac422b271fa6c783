"""The house itself: packages come from here, imports are light where they must be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import evaluate
import headstart
from tests.headstart.shell import Home


def test_evaluate_is_our_package_and_not_its_namesake() -> None:
    assert Path(evaluate.__file__).parent.parent == Path(headstart.__file__).parent.parent


def test_the_command_line_answers_help_without_loading_torch() -> None:
    code = "import sys; from headstart import cli; cli.run(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


LOADS_MODELS = """
found = {name for name in sys.modules if name.partition(".")[0] in ("transformers", "peft")}
light = ("extract.encoders", "extract.encoders.protocols", "extract.encoders.specs")
found |= {name for name in sys.modules if name.startswith("extract.encoders") and name not in light}
sys.exit("imported: " + ", ".join(sorted(found)[:9]) if found else 0)
"""
"""Ends a program, with a complaint if it has imported what loads encoders."""


def test_the_api_is_imported_without_what_loads_encoders() -> None:
    code = f"import sys; import headstart.api{LOADS_MODELS}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_heads_are_trained_and_evaluated_without_what_loads_encoders(home: Home) -> None:
    code = f"""
import sys
from pathlib import Path
from headstart import cli
code = cli.run("train linear --stores stores --runs runs --set epochs=1 target_size=[16,24]".split())
assert code == cli.DONE
code = cli.run(["evaluate", *map(str, Path("runs").iterdir()), "--split", "val", "--out", "report"])
assert code == cli.DONE
{LOADS_MODELS}"""
    done = subprocess.run([sys.executable, "-c", code], cwd=home.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (home.folder / "report" / "report.html").is_file()


def test_a_shadowed_evaluate_is_said_clearly(tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from headstart import cli; cli.main(['cache', 'info'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "another package named 'evaluate'" in done.stderr
