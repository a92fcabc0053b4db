"""Lookup tables addressed by token id, LSH or a learned softmax, added, concatenated or used as experts.

Run:  python -m sparsejax ablate experiments/lookup.py --workdir=runs/lookup --out=experiments
"""

from sparsejax.ablate import Arm, Study, pod

ADDRESSES, CONSUMES = ("token_id", "lsh", "softmax"), ("add", "concat", "expert")
ARMS = ("dense", *(f"{address}-{consume}" for address in ADDRESSES for consume in CONSUMES))

STUDY = Study(
    question="Do lookup tables help at equal FLOPs, and how are they best addressed and used?",
    config="configs/lookup_arm.py",
    arms={name: Arm(argument=name) for name in ARMS},
    base="dense",
    seeds=(0, 1, 2, 3),
    varies=("model.pattern", "model.blocks", "model.memory", "optimizer.tables"),
    scales={"pod": pod(without=("model.d_model", "model.num_heads"))},  # widths are those of the arms
    deviation=0.035,
    effect=0.05,
    shown=("memory/bucket_entropy", "memory/max_load", "memory/rows_touched"),
    timed=True,
    notes=(
        "Two layers; in the second a table of 256 rows stands beside the feed-forward network. An arm is an address "
        "and a consumption. What they multiply is taken from the width of both networks. Bucket entropy is 1 where all "
        "rows are looked up equally often, the largest load the share of lookups that goes to one row.",
    ),
)
