import pytest

from projects import ROOT


@pytest.fixture
def folder(tmp_path):
    """Of a study in a project of its own."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path
