"""What is promised of compiled programs, by the real TPU compiler: each as small as it still says something."""

import functools
import importlib.util

import pytest

from support import told_by

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[plan]' (no TPU)"
    ),
]

WIDE = {"data.sequence_length": 512, "model.d_model": 512, "model.num_heads": 4, "model.dtype": "bfloat16"}
WIDE |= {"model.vocab_size": 512, "model.repeats": 1}


@functools.cache
def compiled(config, topology, mesh, settings=()):
    words = [f"--config={config}", *(f"--config.{name}={value}" for name, value in settings)]
    (step,) = told_by("-m", "sparsejax", "plan", *words, f"--topology={topology}", f"--mesh={mesh}", "--format=json")[
        "compiled"
    ]
    return step


def over_least(step, purpose):
    (need,) = (each for each in step["needs"] if each["purpose"] == purpose)
    return need["sent"] / need["least"]


def with_slots(rows):
    """One choice of eight experts and a capacity that is the even load."""
    moe = {"router.selection.k": 1, "router.weight": "raw", "capacity_factor": 1.0, "num_experts": 8, "d_ff": 1024}
    moe = {f"model.blocks.moe.{name}": value for name, value in moe.items()}
    return tuple((WIDE | {"model.pattern": "('moe',)", "data.batch_size": rows} | moe).items())


@pytest.mark.parametrize(
    ("topology", "mesh", "devices"), [("v5e:4x4", "4,4,1", 16), ("v5p:8x8x8", "64,8,1", 512)], ids=["v5e", "v5p"]
)
def test_an_exchange_sends_what_it_must(topology, mesh, devices):
    step = compiled("configs/tiny.py", topology, mesh, with_slots(devices))
    assert 0.99 <= over_least(step, "exchange of tokens") <= 1.05
    kinds = {each["kind"] for each in step["traffic"] if each["purpose"] == "exchange of tokens"}
    assert kinds == {"all-to-all"}


def test_experts_are_gathered_by_fsdp_alone_and_routers_say_nothing():
    """Along `data` weights are gathered, along `expert` nothing is; no module but those named sends anything."""
    step = compiled("configs/tiny.py", "v5e:4x4", "4,4,1", with_slots(16))
    assert not step["findings"]
    gathers = [each for each in step["traffic"] if each["kind"] == "all-gather"]
    assert gathers and all(each["axes"] == ["data"] for each in gathers)
    assert over_least(step, "gathers of split parameters") <= 1.05
    routers = [each for each in step["traffic"] if any("route" in scope for scope in each["scopes"])]
    assert sum(each["bytes"] for each in routers if each["purpose"] != "gathers of split parameters") < 64 * 1024


def test_a_step_with_such_a_table_gathers_no_parameter_more():
    """The whole training step of a model that looks up hashed bigrams in it."""
    table = {"": "lookup", ".address": "n_grams", ".address.orders": "(2,)", ".address.heads": 1}
    table |= {".address.buckets": 2**24, ".blocks": "('dense',)", ".storage": "rows"}
    small = {"model.d_model": 128, "model.num_heads": 1, "model.pattern": "('dense',)", "data.batch_size": 16}
    small |= {"model.repeats": 1, "data.sequence_length": 512}
    settings = small | {f"model.memory.ngrams{key}": value for key, value in table.items()}
    step = compiled("configs/tiny.py", "v5e:4x4", "4,4,1", tuple(settings.items()))
    assert over_least(step, "gathers of split parameters") <= 1.2
    sent = {each["kind"]: each["bytes"] for each in step["traffic"] if each["purpose"] == "rows of lookup tables"}
    assert sent["all-to-all"] <= 5 * 1.1 * 512 * (128 + 1) * 4  # two rounds, and three loops of more as if all ran once
    assert sent.keys() == {"all-to-all", "all-reduce"} and sent["all-reduce"] < 1024


def test_a_table_of_sixteen_million_rows_moves_what_was_read():
    """Shared out over 16 devices: no gather; a round there and back sends little more than the rows, and their numbers.
    Rounds beyond the first are loops that skewed ids alone enter."""
    found = told_by("tests/plan/table_on_a_pod.py")
    assert {kind for kind, *_ in found["moved"]} == {"all-to-all", "all-reduce"}
    first = [(kind, size) for kind, size, again in found["moved"] if not again]
    rows = [size for kind, size in first if kind == "all-to-all" and size > 4 * found["id_bytes"]]
    assert len(rows) == 2 and sum(rows) <= 1.25 * 2 * found["row_bytes"]
    assert sum(size for _, size in first) - sum(rows) <= 1.25 * 2 * found["id_bytes"] + 1024
    assert found["temporary"] < found["table_bytes"] / 100 and found["in_place"] > 3 * found["table_bytes"]
