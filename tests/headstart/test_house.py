"""The house itself: packages come from here, imports are light where they must be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import evaluate
import headstart


def test_evaluate_is_our_package_and_not_its_namesake() -> None:
    assert Path(evaluate.__file__).parent.parent == Path(headstart.__file__).parent.parent


def test_the_command_line_answers_help_without_loading_torch() -> None:
    code = "import sys; from headstart import cli; cli.run(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_a_shadowed_evaluate_is_said_clearly(tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from headstart import cli; cli.main(['cache', 'info'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "another package named 'evaluate'" in done.stderr
