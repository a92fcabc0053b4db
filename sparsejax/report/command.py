"""The `report` command."""

import argparse
from pathlib import Path

from sparsejax.base.errors import RequestError
from sparsejax.report.runs import open_runs

PACKAGES = "report needs Altair and vl-convert: pip install -e '.[report]'"


def report_command(args: argparse.Namespace) -> int:
    """Writes the page of the runs and prints where it is."""
    if not args.runs:
        raise RequestError("report needs the folder of a run: report RUN [RUN ...]")
    runs = open_runs(args.runs)
    out: Path = args.out or args.runs[0] / "report.html"
    if not out.parent.is_dir():
        raise RequestError(f"--out={out}: there is no folder {out.parent}")
    if out.is_dir():
        raise RequestError(f"--out={out} is a folder; allowed: the name of a file")
    try:
        from sparsejax.report.page import write_page
    except ModuleNotFoundError as error:
        if error.name not in ("altair", "vl_convert"):
            raise
        raise RequestError(PACKAGES) from None
    write_page(out, args.runs, " and ".join(run.name for run in runs))
    print(out)
    return 0
