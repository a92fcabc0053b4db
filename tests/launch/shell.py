"""Programs that play others, and checks of scripts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def program(folder: Path, name: str, source: str) -> Path:
    """A Python program that can be called by its name, once `folder` is on the PATH."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\n{source}")
    path.chmod(0o755)
    return path


def with_programs(folder: Path, **more: str) -> dict[str, str]:
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"} | more


def check_script(text: str) -> None:
    """Fails unless bash can read the script, and shellcheck, where it is installed, has nothing to say about it."""
    read = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert read.returncode == 0 and not read.stderr, read.stderr
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if shellcheck:
        # SC1091: a line of --setup reads a file that is not here
        done = subprocess.run([shellcheck, "--exclude=SC1091", "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
