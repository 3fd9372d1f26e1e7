"""Scratch directories: whose are swept, and whose are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from app.scratch import Scratch

HOLD = """
import sys, time
from pathlib import Path
from app.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]))
(scratch.path / "dataset").write_text("rows")
print(scratch.path, flush=True)
time.sleep(60)
"""


def hold(root: Path) -> tuple[subprocess.Popen[str], Path]:
    """Another process with a scratch directory of its own."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_holds_is_not(tmp_path: Path) -> None:
    killed, left = hold(tmp_path)
    living, held = hold(tmp_path)
    try:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait(10)
        assert (left / "dataset").exists()
        own = Scratch(tmp_path)
        assert not left.exists()
        assert (held / "dataset").exists()
        assert own.path.is_dir()
        own.close()
        assert (held / "dataset").exists()
    finally:
        living.kill()
        living.wait(10)


def test_closing_removes_the_directory(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "new" / "root")
    (scratch.path / "dataset").write_text("rows")
    scratch.close()
    assert not scratch.path.exists()


def test_a_directory_whose_owner_died_before_it_was_locked_is_swept(tmp_path: Path) -> None:
    (tmp_path / "process-x").mkdir()
    Scratch(tmp_path).close()
    assert not (tmp_path / "process-x").exists()
