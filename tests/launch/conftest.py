"""Lets the tests here import `launching` and `shell`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
