"""The `report` command."""

import argparse
from pathlib import Path

from sparsejax.base.errors import RequestError
from sparsejax.report.compare import compare
from sparsejax.report.page import write_page
from sparsejax.report.runs import open_runs


def report_command(args: argparse.Namespace) -> int:
    """Writes the page of the runs and prints where it is, or prints where two of them part."""
    if not args.runs:
        raise RequestError("report needs the folder of a run: report RUN [RUN ...]")
    if args.compare and (len(args.runs) != 2 or args.out is not None):
        raise RequestError("--compare takes two runs and writes no page: report --compare A B")
    runs = open_runs(args.runs)
    if args.compare:
        print("\n".join(compare(*runs)))
        return 0
    out: Path = args.out or args.runs[0] / "report.html"
    if not out.parent.is_dir():
        raise RequestError(f"--out={out}: there is no folder {out.parent}")
    if out.is_dir():
        raise RequestError(f"--out={out} is a folder; allowed: the name of a file")
    write_page(out, args.runs, " and ".join(run.name for run in runs))
    print(out)
    return 0
