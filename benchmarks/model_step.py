"""The training step and the evaluation of a model on one batch of random tokens, for timing."""

from sparsejax.data.config import DataConfig
from sparsejax.data.tasks import Masked, NextToken
from sparsejax.model.config import ModelConfig
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.timing import Step


def model_step(model: ModelConfig, rows: int, length: int) -> Step:
    """Of a model, whatever it is trained on, by the optimizer of the defaults."""
    data = DataConfig(batch_size=rows, sequence_length=length, task=NextToken() if model.causal else Masked())
    return Step(ExperimentConfig(model=model, data=data))
