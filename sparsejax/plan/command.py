"""The `plan` command."""

import argparse
import json
import sys

import jax

from sparsejax.base.config import Loaded
from sparsejax.plan.estimate import plan
from sparsejax.plan.tables import print_plan
from sparsejax.train.config import ExperimentConfig


def plan_command(loaded: Loaded[ExperimentConfig], args: argparse.Namespace) -> int:
    """Prints the plan of the config on every `--mesh` (none: its own), as tables or as one JSON object on one line."""
    # Nothing is computed; where there is an accelerator, a dry run must not take it from the run that uses it.
    jax.config.update("jax_platforms", "cpu")
    result = plan(loaded.config, args.mesh)
    if args.format == "json":
        print(json.dumps(result.to_dict()))
    else:
        print_plan(result, sys.stdout)
    return 0
