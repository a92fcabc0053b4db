import numpy as np

from sparsejax.model.config import ModelConfig
from sparsejax.train.watch import Watch

import run_folders

BAD = np.array([[4000, 1, 1, 1, 1, 1, 1, 1]] * 2)


def see(watch, step, loads):
    arrays = run_folders.loads(np.asarray(loads)) | {f"{name}/tokens": np.asarray(4007) for name in run_folders.LAYERS}
    return watch(run_folders.train_row(step), arrays)


def test_trouble_is_told_when_it_begins_and_again_when_it_comes_back():
    watch, even = Watch(ModelConfig()), np.full((2, 8), 500)
    told = [len(see(watch, step, BAD)) for step in range(1, 6)]
    assert told == [0, 0, 2, 0, 0]  # for each of two layers
    assert see(watch, 6, even) == []
    assert [len(see(watch, step, BAD)) for step in range(7, 10)] == [0, 0, 2]


def test_a_resumed_run_remembers(tmp_path):
    """As if it had never stopped: neither late nor twice."""
    run_folders.write_run(tmp_path / "run", steps=(1, 2), passages=False)
    for step in (1, 2):
        arrays = run_folders.loads(BAD) | {f"{name}/tokens": np.asarray(4007) for name in run_folders.LAYERS}
        np.savez(tmp_path / "run/routing" / f"{step}.npz", **arrays)
    watch = Watch(ModelConfig())
    watch.resume(tmp_path / "run", 2)
    assert len(see(watch, 3, BAD)) == 2
    (tmp_path / "run/routing/2.npz").write_bytes(b"PK")
    watch = Watch(ModelConfig())
    watch.resume(tmp_path / "run", 2)
    assert see(watch, 3, BAD) == []
