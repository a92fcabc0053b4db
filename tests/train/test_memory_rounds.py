"""Rounds of exchange on real text, in a whole run on eight devices."""

import pytest

from runs import arguments, here, rows

SETTINGS = {
    "model.memory.ids": "lookup",
    "model.memory.ids.blocks": "('dense',)",
    "model.memory.ids.storage": "rows",
    "model.memory.ngrams": "lookup",
    "model.memory.ngrams.address": "n_grams",
    "model.memory.ngrams.address.orders": "(2, 3)",
    "model.memory.ngrams.address.heads": 2,
    "model.memory.ngrams.content.size": 8,
    "model.memory.ngrams.content.join": "concat",
    "model.memory.ngrams.consume": "project",
    "model.memory.ngrams.blocks": "('dense',)",
    "model.memory.ngrams.storage": "rows",
    "model.memory.states": "lookup",
    "model.memory.states.address": "hyperplanes",
    "model.memory.states.blocks": "('moe',)",
    "model.memory.states.storage": "rows",
    "data.sequence_length": 128,
    "data.batch_size": 8,
    "data.name": "stdlib",
    "mesh.data": 8,
    "optimizer.schedule.warmup_steps": 1,
    "train.steps": 3,
}


@pytest.mark.slow
def test_one_round_is_enough(tmp_path):
    """For ids and n-grams of the embedded corpus, whose most frequent ones every device wants."""
    done = here(*arguments("train", f"--workdir={tmp_path}", **SETTINGS))
    assert done.status == 0, done.err
    for row in rows(tmp_path, "train").values():
        assert row["memory/fetch_rounds"] == row["memory/exchange_rounds"] == 1
