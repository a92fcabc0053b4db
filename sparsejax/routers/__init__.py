"""Floor 2: decisions. A router is a point on orthogonal axes; each axis is a registry of small frozen dataclasses
that are called.

To add, say, a score: write a dataclass with a `__call__` in `scores.py` and one line in its dict. Configs, the
command line, the plan and the contract tests pick it up by name."""
