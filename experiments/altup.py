"""AltUp and Recycled-AltUp beside plain models that are wider.

Run:  python -m sparsejax ablate experiments/altup.py --workdir=runs/altup --out=experiments
"""

from sparsejax.ablate import Arm, Study, pod

WIDTHS, STREAMS = (64, 72, 80, 96), (2, 4)
ARMS = (*(f"dense_{width}" for width in WIDTHS), *(f"{kind}_{k}" for kind in ("altup", "recycled") for k in STREAMS))

STUDY = Study(
    question="Are streams worth more than width?",
    config="configs/altup_arm.py",
    arms={name: Arm(argument=name) for name in ARMS},
    base="dense_64",
    equal="tokens",
    varies=("model.d_model", "model.streams"),
    scales={"pod": pod(without=("model.d_model", "model.num_heads"))},  # widths are those of the arms
    deviation=0.035,
    effect=0.05,
    shown=("altup/stream_cosine", "altup/innovation"),
    timed=True,
    notes=(
        "Four layers, bytes. `dense_D` is the plain model of width D; `altup_K` and `recycled_K` have K streams of "
        "width 64. Arms see the same tokens and are not equal in FLOPs: what they spend stands in the second table, "
        "and `report.html` draws the loss against it.",
    ),
)
