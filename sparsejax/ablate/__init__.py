"""Studies: arms × seeds made equal in one respect, trained, and told apart only where statistics can.

from sparsejax.ablate import Arm, Study, grid
"""

from sparsejax.ablate.study import Arm, Study, grid, pod

__all__ = ["Arm", "Study", "grid", "pod"]
