"""What is measured of lookup layers."""

import numpy as np
import pytest

from sparsejax.base.alerts import Seen
from sparsejax.base.reports import MemoryReport, Report
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.lsh import Hyperplanes
from sparsejax.model.config import ModelConfig
from sparsejax.train.memory_metrics import churn, loss_by_frequency, memory_rows, probed, table_row
from sparsejax.train.step import TableReport, probe_of
from sparsejax.train.watch import collapsed_tables


def model(**address) -> ModelConfig:
    lsh = MemorySpec(address=Hyperplanes(bits=3, **address), blocks=("dense",))
    ids = MemorySpec(place="embedding")
    return ModelConfig(vocab_size=16, pattern=("dense",), repeats=2, memory={"lsh": lsh, "ids": ids})


def reports(second_layer: list[int]) -> dict[str, Report]:
    """Of 8 lookups in each layer; those of the first are spread evenly."""
    number = lambda value: np.array([value, value])  # noqa: E731
    loads = np.array([[1] * 8, second_layer])
    counts = {"lookups": number(8), "tokens": number(8), "masked": number(0), "fetches": number(4)}
    lsh = MemoryReport(loads=loads, rounds=np.array([4, 6]), **counts)
    ids = MemoryReport(loads=np.eye(16)[0] * 8, lookups=np.array(8), tokens=np.array(8), masked=np.array(0))
    return {"embedding": Report(memory={"ids": ids}), "pattern_0": Report(memory={"lsh": lsh})}


def test_each_lookup_layer_has_its_row():
    first, second, third = memory_rows(model(), reports([8, 0, 0, 0, 0, 0, 0, 0]))
    assert (first["memory/bucket_entropy"], first["memory/rows_touched"]) == (0, 1)  # the embedding's
    assert second["memory/bucket_entropy"] == pytest.approx(1) and second["memory/rows_touched"] == 8
    assert "memory/fetch_rounds" not in first
    assert (second["memory/fetch_rounds"], third["memory/fetch_rounds"]) == (1, 1.5)
    assert third["memory/bucket_entropy"] == 0 and third["memory/dead_rows"] == 7
    assert third["memory/max_load"] == 1 and second["memory/max_load"] == pytest.approx(1 / 8)


def test_a_collapse_is_named_with_what_helps():
    seen = lambda *loads: Seen({"step": 3}, {"01_dense/lsh/loads": np.array(loads)})  # noqa: E731
    assert collapsed_tables(seen(2, 1, 1, 1, 1, 1, 1, 0), model()) == []
    (alert,) = collapsed_tables(seen(8, 0, 0, 0, 0, 0, 0, 0), model())
    assert alert.step == 3 and alert.layer == "01_dense/lsh" and "0.00" in alert.line and "earlier layer" in alert.line
    (alert,) = collapsed_tables(seen(8, 0, 0, 0, 0, 0, 0, 0), model(centre=False))
    assert "centre=true" in alert.line


def test_updates_are_means_over_steps_and_tables():
    of = lambda touched, rounds: TableReport(touched=np.array(touched), rounds=np.array(rounds))  # noqa: E731
    row = table_row({"a": of(40, 4), "b": of(80, 8)}, 4)
    assert row == {"memory/rows_updated": 15, "memory/exchange_rounds": 1.5}
    assert table_row({}, 4) == {}


def test_the_loss_of_frequent_and_of_rare_tokens():
    targets = np.array([1, 50, 0, 25, 25, 3])
    row = loss_by_frequency(targets * np.array([9.0, 1.0, 0.0, 2.0, 3.0, 6.0]), targets)
    assert row["memory/loss_band_1"] == 1  # the token with half of the targets
    assert row["memory/loss_band_2"] == 2 and row["memory/loss_band_3"] == 3
    assert row["memory/loss_band_4"] == pytest.approx((3 * 6 + 9) / 4)


def test_churn_is_of_addresses_that_depend_on_parameters():
    reads = {"embedding": {"ids": np.zeros((1, 4, 1))}, "pattern_0": {"lsh": np.zeros((2, 1, 4, 1))}}
    before = probed(probe_of(model(), reads))
    assert list(before) == ["pattern_0/lsh"] and before["pattern_0/lsh"].shape == (2, 4, 1)
    now = {"pattern_0/lsh": np.array([[[0], [1], [0], [0]], [[5], [0], [0], [0]]], np.int32)}
    assert churn(before, now) == {"memory/churn": 0.25} and churn(before, before) == {"memory/churn": 0}
    assert churn(None, now) == {}
    padded = {"pattern_0/lsh": np.full((2, 4, 1), -1)}
    assert churn(padded, padded) == {}
    long = probed({"pattern_0": {"lsh": np.arange(2 * 3000).reshape(2, 10, 300, 1)}})["pattern_0/lsh"]
    assert long.shape == (2, 1024, 1) and long[1, 0] == 3000, "every layer has its part of the probe"
