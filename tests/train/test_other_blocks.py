"""Blocks beside `dense` and `moe`, and free experts, in one whole run: it trains, and generation is
refused where a token alone would be another function."""

import numpy as np

from runs import arguments, here, rows

MIXED = {
    "soft": {"": "soft", ".slots_per_expert": 2, ".allow_leak": True},
    "smear": {"": "merged", ".segment_length": "none", ".allow_leak": True},
    "lory": {"": "merged", ".segment_length": 4},
    "free": {"": "moe", ".copy_experts": 3, ".zero_experts": 1, ".constant_experts": 1, ".router.z_loss": 0.0},
}
SETTINGS = {f"model.blocks.{name}{field}": value for name, of in MIXED.items() for field, value in of.items()} | {
    "model.pattern": f"({','.join(MIXED)})",
    "optimizer.schedule.warmup_steps": 1,
    "train.steps": 3,
}


def test_they_train_and_what_cannot_generate_says_so(tmp_path):
    done = here(*arguments("train", f"--workdir={tmp_path}", **SETTINGS))
    assert done.status == 0, done.err
    (first, last) = rows(tmp_path, "train").values()
    assert np.isfinite([first["loss"], last["loss"]]).all() and last["flops"] > first["flops"] > 0
    assert 0 < last["moe/drop_fraction"] < 0.25, "one block of four drops anything"
    arrays = np.load(tmp_path / "routing" / "3.npz")
    for layer, counts in (("00_soft", 8), ("01_smear", 8), ("02_lory", 8), ("03_free", 8 + 5)):
        assert arrays[f"{layer}/assigned"].shape == (counts,)
    assert len(set(arrays["00_soft/assigned"])) == len(set(arrays["02_lory/assigned"])) == 1
    assert arrays["02_lory/assigned"][0] == 4 * arrays["01_smear/assigned"][0], "rows of 16 tokens, segments of 4"
    made = here("generate", f"--workdir={tmp_path}", "--prompt=a b", "--max-tokens=4", "--format=json")
    assert "config.model.blocks.soft.name: a slot mixes all tokens of the row, which generation lacks" in made.error
