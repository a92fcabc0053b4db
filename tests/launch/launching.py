"""`launch` on the smallest experiment."""

from pathlib import Path

from runs import here

CONFIG = f"--config={Path(__file__).parents[2] / 'configs' / 'tiny.py'}"


def printed(target: str, *flags: str) -> str:
    """The job, as it is printed."""
    done = here("launch", target, CONFIG, *flags)
    assert done.status == 0 and not done.err, done.err
    return done.out
