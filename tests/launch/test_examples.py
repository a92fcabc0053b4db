"""The jobs in `launch/` are what their commands print; a site's flags are as if they stood on the command line."""

import importlib.util
import shlex
from pathlib import Path

import pytest

from launching import CONFIG, printed
from runs import here
from shell import check_script

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".yaml"))
COMMENT = "# python -m sparsejax "


def test_there_is_one_for_each_target():
    targets = {line.split()[5] for path in EXAMPLES for line in path.read_text().splitlines() if COMMENT in line}
    assert targets == {"local", "slurm", "jobset", "tpu-vm"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_what_its_command_prints(path, monkeypatch):
    text = path.read_text()
    if path.suffix == ".sh":
        check_script(text)
    elif importlib.util.find_spec("kubernetes") is None:
        pytest.skip("the Kubernetes client is not installed (extra `launch`)")
    monkeypatch.chdir(ROOT)
    (command,) = [line.removeprefix(COMMENT) for line in text.splitlines() if line.startswith(COMMENT)]
    assert here(*shlex.split(command)).out == text


def test_flags_of_a_site_come_before_the_others(tmp_path):
    site = tmp_path / "site.txt"
    site.write_text("# ours\n--partition=a\n\n  --time=10\n")
    for words in ([f"--site={site}"], ["--site", str(site)]):
        text = printed("slurm", *words, "--partition=b")
        assert "#SBATCH --partition=b\n" in text and "#SBATCH --time=10\n" in text


def test_a_site_that_does_not_fit_is_refused(tmp_path):
    site = tmp_path / "site.txt"
    assert f"--site={site}: could not be read" in here("launch", "slurm", CONFIG, f"--site={site}").error
    site.write_text("--zone=x\n")
    assert "unknown flag '--zone=x' for launch slurm" in here("launch", "slurm", CONFIG, f"--site={site}").error
    site.write_text("--setup=a\x1bb\n")
    assert "only printable characters" in here("launch", "slurm", CONFIG, f"--site={site}").error
