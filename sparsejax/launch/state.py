"""What became of a job that was handed over: how it ended, if the cluster says that it did."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
"""States in which SLURM does nothing more for a job; a requeued one is pending again."""


def last_words(log: Path) -> str:
    """The last line of a log in which something says why it ended, or else its last line."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    told = [line for line in lines if line.startswith(("error:", "failed:"))]
    return told[-1] if told else (lines[-1] if lines else "it said nothing")


def of_slurm(said: str) -> Optional[str]:
    """How the job of which sbatch said this ended; None while it goes on, and where that cannot be told."""
    number = re.search(r"Submitted batch job (\d+)", said)
    if number is None or shutil.which("scontrol") is None:
        return None
    done = _run(["scontrol", "--oneliner", "show", "job", number[1]])
    if done.returncode:  # also when the controller does not answer, which says nothing of the job
        known = "Invalid job id" not in done.stderr
        return None if known else f"SLURM no longer knows its job {number[1]}"
    fields = dict(word.partition("=")[::2] for word in done.stdout.split())
    if fields["JobState"] not in ENDED:
        return None
    told = last_words(Path(fields.get("StdOut", "")))
    return f"SLURM's job {number[1]} ended as {fields['JobState']}, exit code {fields['ExitCode']}: {told}"


def of_jobset(manifest: str) -> Optional[str]:
    """How the JobSet in this manifest ended; None while it goes on, and where that cannot be told."""
    if shutil.which("kubectl") is None:
        return None
    done = _run(["kubectl", "get", "--filename=-", "--output=json", "--ignore-not-found"], manifest)
    if done.returncode:
        return None
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    sets = [each for each in found.get("items", [found]) if each.get("kind") == "JobSet"]
    if not sets:
        return "the cluster no longer has its JobSet"
    status = sets[0].get("status", {})
    if status.get("terminalState") is None:
        return None
    told = [each.get("message") or "" for each in status.get("conditions", []) if each.get("status") == "True"]
    return f"its JobSet ended as {status['terminalState']}: {told[-1] if told else 'it said nothing'}"


def _run(words: Sequence[str], text: Optional[str] = None) -> subprocess.CompletedProcess:
    return subprocess.run(words, input=text, capture_output=True, text=True, check=False)
