"""Checkpoints: any mesh to any mesh, damage found and named, failed writes reported, donation safe."""

import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from sparsejax.base.errors import RequestError, RunError
from sparsejax.base.structs import struct
from sparsejax.train import checksums
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.checksums import find_damage

SPECS = {"w": P("data", "tensor"), "experts": P("expert", None, "tensor"), "scale": P(None)}
SHAPES = {"w": (8, 16), "experts": (4, 4, 8), "scale": (8,)}


@struct
class State:
    step: Array
    params: nnx.State
    opt_state: optax.OptState


def mesh_of(*shape):
    return jax.make_mesh(shape, ("data", "expert", "tensor"), devices=jax.devices()[: np.prod(shape)])


def make_state(mesh, step, shapes=SHAPES):
    """A state whose numbers depend on `step`, laid out on `mesh`."""

    def place(name, scale):
        value = step + scale * np.arange(np.prod(shapes[name]), dtype=np.float32).reshape(shapes[name])
        return nnx.Param(jax.device_put(value, NamedSharding(mesh, SPECS[name])), group="dense", axes=())

    tree = lambda scale: nnx.State({name: place(name, scale) for name in shapes})  # noqa: E731
    count = jax.device_put(np.int32(step), NamedSharding(mesh, P()))
    return State(
        step=count,
        params=tree(1.0),
        opt_state=(optax.ScaleByAdamState(count, tree(2.0), tree(3.0)), optax.EmptyState()),
    )


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same(state, want):
    assert jax.tree.structure(state) == jax.tree.structure(want)
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
        assert got.sharding == wanted.sharding and got.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, keep=2)
    for step in (1, 2):
        assert checkpoints.save(step, make_state(mesh_of(2, 2, 2), step), {"tokens": 100 * step, "seconds": 0.5})
    checkpoints.close()
    return tmp_path / "checkpoints"


def reopen(directory):
    return Checkpoints(directory, every=1, keep=2)


class TestRestore:
    @pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 1), (4, 2, 1)])
    def test_onto_any_mesh(self, saved, shape):
        want = make_state(mesh_of(*shape), 2)
        state, progress, step = reopen(saved).restore(abstract(want))
        assert_same(state, want)
        assert progress == {"tokens": 200, "seconds": 0.5} and step == 2

    def test_is_silent(self, saved, caplog):
        (saved / "2" / "_CHECKPOINT_METADATA").write_text("{")  # orbax's own bookkeeping, of no consequence
        reopen(saved).restore(abstract(make_state(mesh_of(1, 1, 1), 2)))
        assert not caplog.records

    def test_an_older_step(self, saved):
        want = make_state(mesh_of(1, 1, 1), 1)
        state, progress, step = reopen(saved).restore(abstract(want), step=1)
        assert_same(state, want)
        assert progress["tokens"] == 100 and step == 1

    def test_part_of_the_state(self, saved):
        target = abstract(make_state(mesh_of(1, 1, 1), 2))
        part = State(step=target.step, params=target.params, opt_state=())
        with pytest.raises(RequestError, match=r"opt_state/0/count int32.* has no place"):
            reopen(saved).restore(part)
        state, _, _ = reopen(saved).restore(part, partial=True)
        np.testing.assert_array_equal(state.params["w"][...], make_state(mesh_of(1, 1, 1), 2).params["w"][...])

    def test_reading_changes_nothing(self, saved):
        before = sorted(os.walk(saved))
        reopen(saved).restore(abstract(make_state(mesh_of(1, 1, 1), 2)))
        assert sorted(os.walk(saved)) == before

    def test_nothing_there(self, tmp_path):
        checkpoints = reopen(tmp_path / "none")
        assert checkpoints.latest_good() is None and checkpoints.steps() == []
        with pytest.raises(RequestError, match="no checkpoint in"):
            checkpoints.restore({})
        assert not (tmp_path / "none").exists()

    def test_no_such_step(self, saved):
        with pytest.raises(RequestError, match=r"no checkpoint of step 7 .*there are: 1; 2"):
            reopen(saved).restore({}, step=7)

    def test_other_shapes_are_named(self, saved):
        target = abstract(make_state(mesh_of(1, 1, 1), 2, SHAPES | {"w": (8, 32)}))
        with pytest.raises(RequestError, match=r"params/w is float32\[8, 16\], not float32\[8, 32\]"):
            reopen(saved).restore(target)

    def test_missing_arrays_are_named(self, saved):
        target = abstract(make_state(mesh_of(1, 1, 1), 2))
        more = nnx.State({"extra": nnx.Param(target.params["w"].get_value(), group="dense", axes=()), **target.params})
        with pytest.raises(RequestError, match=r"it lacks params/extra float32\[8, 16\]"):
            reopen(saved).restore(State(step=target.step, params=more, opt_state=target.opt_state))


class TestSave:
    def test_keeps_the_newest_and_every_nth(self, tmp_path):
        checkpoints = Checkpoints(tmp_path, every=1, keep=2, keep_every=3)
        for step in range(1, 9):
            checkpoints.save(step, {"x": jnp.zeros(3)}, {})
        checkpoints.close()
        assert checkpoints.steps() == [3, 6, 7, 8]

    def test_due(self, tmp_path):
        assert [step for step in range(1, 10) if Checkpoints(tmp_path, every=4, keep=1).due(step)] == [4, 8]

    def test_a_step_is_saved_once(self, saved):
        checkpoints = reopen(saved)
        assert not checkpoints.save(2, make_state(mesh_of(1, 1, 1), 5), {})
        checkpoints.close()
        assert checkpoints.restore(abstract(make_state(mesh_of(1, 1, 1), 2)))[1]["tokens"] == 200

    def test_the_state_may_be_donated_at_once(self, tmp_path):
        mesh = mesh_of(2, 2, 2)
        checkpoints = reopen(tmp_path)
        place = NamedSharding(mesh, P("data", "tensor"))
        bump = jax.jit(lambda x: x + 1, donate_argnums=0)
        x = jax.device_put(np.zeros((512, 512), np.float32), place)
        for step in range(4):
            checkpoints.save(step, {"x": x}, {})
            for _ in range(3):
                x = bump(x)
            jax.block_until_ready(x)
            checkpoints.wait()
            got, _, _ = checkpoints.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)})
            np.testing.assert_array_equal(np.asarray(got["x"]), 3.0 * step)
        checkpoints.close()


def array_file(step_folder):
    """The largest file of a checkpoint: the arrays' bytes."""
    return max((path for path in step_folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder):
    path = array_file(folder)
    path.write_bytes(path.read_bytes()[:-1])
    return "has .* bytes, not"


def flip_a_bit(folder):
    path = array_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "other contents"


def lose_an_array_file(folder):
    array_file(folder).unlink()
    return "state/.* is missing"


def garble_metadata(folder):
    (folder / "state" / "_METADATA").write_text("{")
    return "state/_METADATA has 1 bytes"


def lose_checksums(folder):
    (folder / "checksums.json").unlink()
    return "checksums.json is missing"


def garble_checksums(folder):
    (folder / "checksums.json").write_bytes(b"\xff\x00 garbage")
    return "checksums.json is garbled"


def lose_everything(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    return "checksums.json is missing"


def test_of_very_large_checkpoints_sizes_are_compared(tmp_path, monkeypatch):
    (tmp_path / "state").mkdir()
    file = tmp_path / "state" / "array"
    file.write_bytes(b"12345")
    monkeypatch.setattr(checksums, "CHECKED_BYTES", 4)
    checksums.write_checksums(tmp_path)
    file.write_bytes(b"1234_")
    assert find_damage(tmp_path) == ""
    file.write_bytes(b"1234")
    assert find_damage(tmp_path) == "state/array has 4 bytes, not 5"


DAMAGES = [truncate, flip_a_bit, lose_an_array_file, garble_metadata, lose_checksums, garble_checksums, lose_everything]


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
    def test_is_named_and_the_newest_good_one_used(self, saved, damage, caplog):
        words = damage(saved / "2")
        want = make_state(mesh_of(1, 1, 1), 1)
        checkpoints = reopen(saved)
        state, _, step = checkpoints.restore(abstract(want))
        assert step == 1
        assert_same(state, want)
        assert "checkpoint 2 is damaged" in caplog.text
        with pytest.raises(RunError, match=f"checkpoint 2 .* is damaged: .*{words}"):
            checkpoints.restore(abstract(want), step=2)

    def test_none_good_is_an_error_and_not_a_fresh_start(self, saved):
        truncate(saved / "1")
        flip_a_bit(saved / "2")
        with pytest.raises(RunError, match=r"2: .* other contents .*1: .* bytes, not"):
            reopen(saved).restore(abstract(make_state(mesh_of(1, 1, 1), 1)))

    def test_the_damaged_step_can_be_written_again(self, saved):
        truncate(saved / "2")
        checkpoints = reopen(saved)
        assert checkpoints.latest_good() == 1
        assert checkpoints.save(2, make_state(mesh_of(1, 1, 1), 2), {})
        checkpoints.close()
        assert reopen(saved).latest_good() == 2 and checkpoints.steps() == [1, 2]
        assert find_damage(saved / "2.damaged")

    def test_a_damaged_one_does_not_push_out_a_good_one(self, saved):
        truncate(saved / "2")
        checkpoints = Checkpoints(saved, every=1, keep=1)
        assert checkpoints.latest_good() == 1
        # Steps below the damaged one are written, and counted, as if it were not there.
        (saved / "2").rename(saved / "20")
        checkpoints = Checkpoints(saved, every=1, keep=1)
        assert checkpoints.latest_good() == 1
        assert checkpoints.save(3, make_state(mesh_of(1, 1, 1), 3), {})
        checkpoints.close()
        assert checkpoints.steps() == [3]

    def test_an_unfinished_one_is_not_counted(self, saved, caplog):
        (saved / "2").rename(saved / "2.orbax-checkpoint-tmp")
        checkpoints = reopen(saved)
        assert checkpoints.latest_good() == 1 and checkpoints.steps() == [1]
        assert "checkpoint 2 was never finished" in caplog.text


FULL_DISK = """
    import os, resource, sys, jax, jax.numpy as jnp, numpy as np
    from sparsejax.base.errors import RunError
    from sparsejax.train.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], every=1, keep=2)
    state = {"x": jnp.asarray(np.random.default_rng(0).standard_normal((256, 256)))}
    checkpoints.save(1, state, {})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    try:
        checkpoints.save(2, state, {})
        checkpoints.save(3, state, {})
    except RunError as error:
        print(error)
    checkpoints.close()
    print(os.listdir(sys.argv[1]), checkpoints.steps(), Checkpoints(sys.argv[1], every=1, keep=2).latest_good())
"""

KILLED = """
    import os, sys, jax.numpy as jnp
    from sparsejax.train import checkpoint
    checkpoints = checkpoint.Checkpoints(sys.argv[1], every=1, keep=1)
    checkpoints.save(1, {"x": jnp.ones(3)}, {})
    checkpoints.wait()
    checkpoint.write_checksums = lambda folder: os.kill(os.getpid(), 9)  # before the rename
    checkpoints.save(2, {"x": jnp.ones(3)}, {})
    checkpoints.wait()
"""


def run(script, *args):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)], capture_output=True, text=True, timeout=120
    )


class TestTrouble:
    def test_full_disk_is_one_clear_line_and_harms_no_other_checkpoint(self, tmp_path):
        done = run(FULL_DISK, tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["checkpoint 2 could not be written: File too large", "['1'] [1] 1"]
        assert "Traceback" not in done.stderr

    def test_kill_while_saving_leaves_the_previous_one(self, tmp_path):
        done = run(KILLED, tmp_path)
        assert done.returncode == -9, done.stderr
        checkpoints = Checkpoints(tmp_path, every=1, keep=1)
        assert checkpoints.steps() == [1] and checkpoints.latest_good() == 1
        # The next run clears the remains away.
        checkpoints.save(3, {"x": jnp.ones(3)}, {})
        checkpoints.close()
        assert [path.name for path in tmp_path.iterdir()] == ["3"]
