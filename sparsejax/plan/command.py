"""The `plan` command."""

import argparse
import json
import sys
from typing import Optional

import jax

from sparsejax.base.config import Loaded
from sparsejax.plan.estimate import on_meshes, plan
from sparsejax.plan.pod import compile_step
from sparsejax.plan.tables import print_plan
from sparsejax.train.config import ExperimentConfig


def plan_command(loaded: Loaded[ExperimentConfig], args: argparse.Namespace) -> int:
    """Prints the plan of the config on every `--mesh` (none: its own), as tables or as one JSON object on one line."""
    # Nothing is computed; where there is an accelerator, a dry run must not take it from the run that uses it.
    jax.config.update("jax_platforms", "cpu")
    result = plan(loaded.config, args.mesh)
    topology: Optional[str] = args.topology
    configs = on_meshes(loaded.config, args.mesh) if topology else []
    compiled = [compile_step(each, topology, of) for each, of in zip(configs, result.layouts, strict=False) if topology]
    if args.format == "json":
        more = {"compiled": [step.to_dict() for step in compiled]} if compiled else {}
        print(json.dumps(result.to_dict() | more))
    else:
        print_plan(result, compiled, sys.stdout)
    return 0
