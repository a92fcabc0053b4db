"""A run that begins with the parameters of another one: `train --init-from=RUN`."""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool

from sparsejax.base.config import load
from sparsejax.base.errors import RequestError
from sparsejax.base.processes import is_first
from sparsejax.base.sharding import host_rows, shard_batch
from sparsejax.base.structs import Batch
from sparsejax.base.writers import json_values, write_atomically
from sparsejax.blocks.context import Mode
from sparsejax.data.corpus import Corpus
from sparsejax.data.loader import eval_batches
from sparsejax.memory.address import Fixed, Running
from sparsejax.model.clustered import with_clusters
from sparsejax.model.config import ModelConfig
from sparsejax.model.continued import continued, new_memories, of_memory
from sparsejax.model.lm import LanguageModel
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.record import check_tokenizer
from sparsejax.train.restore import restore_variables
from sparsejax.train.state import TrainState, Variables, abstract_model, first_state, make_optimizer, run_once

RECEIPT = "upcycling.json"
MODES: dict[Mode, str] = {
    "generate": "with a slot for every token",
    "eval": "with the slots of evaluation",
    "train": "with those of training",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Begun:
    """The first state of a run that continues another, and what is to be known of it."""

    state: TrainState
    receipt: dict[str, Any]

    def lines(self) -> list[str]:
        """What the terminal shows."""
        receipt = self.receipt
        begun = f"begun from checkpoint {receipt['step']} of {receipt['run']}"
        if not receipt["tokens_compared"]:
            return [begun, "not compared with that run: the validation split has no token of this domain (of_domain)"]
        differences = [f"{receipt['logit_difference'][mode]:.3g} {words}" for mode, words in MODES.items()]
        return [
            begun,
            f"largest difference of a logit from that run's: {', '.join(differences)} "
            f"(largest logit: {receipt['largest_logit']:.3g}; {receipt['tokens_compared']} tokens)",
        ]

    def write(self, workdir: Path) -> None:
        """Writes the receipt. Raises `RunError` when the disk refuses it."""
        if is_first():
            write_atomically(workdir / RECEIPT, (json.dumps(json_values(self.receipt), indent=2) + "\n").encode())


def check_resumed(workdir: Path, run: Path) -> str:
    """The line which says that `run` is not read again, because `workdir` has checkpoints.

    Raises:
      RequestError: they are those of a run that did not begin from `run`.
    """
    path = workdir / RECEIPT
    begun_from = json.loads(path.read_text())["run"] if path.is_file() else None
    if begun_from != str(run.absolute()):
        what = "did not begin from another run" if begun_from is None else f"began from {begun_from}"
        raise RequestError(
            f"--init-from={run}: {workdir} has checkpoints of a run that {what}; use another --workdir, or resume it "
            "without --init-from"
        )
    return "--init-from is not read again: the folder has checkpoints of the run that began from there"


def begin_from(run: Path, config: ExperimentConfig, corpus: Corpus, mesh: jax.sharding.Mesh) -> Begun:
    """The first state of a run of `config` that begins with the newest good checkpoint in the folder `run`: parameters
    taken over block by block, the optimizer's state fresh, and the same for what counts steps. Needs the mesh to be
    set. Writes nothing.

    Raises:
      RequestError: `run` is not the folder of a run, has no checkpoint, another tokenizer, or arrays that do not fit.
    """
    with _named(run):
        if not (run / "config.json").is_file():
            raise RequestError("not the folder of a run (it has no config.json)")
        check_tokenizer(run, corpus.tokenizer.fingerprint)
        before = _of_run(run, config)
        trained, progress, step = restore_variables(before, run, mesh)
        sources = dataclasses.replace(trained, params=with_clusters(config.model, before.model, trained.params))
        tx = make_optimizer(config)

        def begin(trained: Variables) -> TrainState:
            model = LanguageModel(jax.random.key(config.train.seed), config.model)
            _, fresh, model_state = nnx.split(model, nnx.Param, ...)
            new = new_memories(config.model, before.model)
            model_state = with_addresses(model_state, trained.model_state, new)
            return first_state(config, tx, continued(config.model, fresh, before.model, trained.params), model_state)

        state = jax.block_until_ready(run_once(begin, sources))
    receipt = {"run": str(run.absolute()), "step": step, "tokens": progress["tokens"]}
    domain = next((block.of_domain for block in config.model.blocks.values() if block.of_domain is not None), None)
    batch, real_BT = _some_batch(config, corpus, mesh, domain)
    compared = _compared(config.model, state.variables, before.model, trained, batch, real_BT)
    return Begun(state=state, receipt=receipt | compared)


def with_addresses(fresh: nnx.State, trained: nnx.State, new: Collection[str] = ()) -> nnx.State:
    """The other variables of a new run, with what lookup layers go by, but those of `new` memories: a table learned
    under other hyperplanes or centres means nothing.

    Raises:
      RequestError: the trained model has none of this shape in the same place.
    """
    flat, learned = dict(nnx.to_flat_state(fresh)), dict(nnx.to_flat_state(trained))
    for path, variable in flat.items():
        if isinstance(variable, Fixed | Running) and not of_memory(path, new):
            if path not in learned or learned[path].shape != variable.shape:
                raise RequestError(f"it lacks {'/'.join(map(str, path))} of shape {list(variable.shape)}")
            flat[path] = variable.replace(learned[path][...])
    return nnx.from_flat_state(flat)


def _of_run(run: Path, config: ExperimentConfig) -> ExperimentConfig:
    """`config` with the model of `run`, computed in the same way."""
    before = load(ExperimentConfig, str(run / "config.json")).config.model
    how = {name: getattr(config.model, name) for name in ("dtype", "attention")}
    return dataclasses.replace(config, model=dataclasses.replace(before, remat="none", remat_names=(), **how))


def _some_batch(
    config: ExperimentConfig, corpus: Corpus, mesh: jax.sharding.Mesh, domain: Optional[int]
) -> tuple[Batch, Bool[Array, "B T"]]:
    """The first microbatch of an evaluation that has tokens of the domain (None: of any), or else the last, and where
    it has them."""
    rows, parts = host_rows(mesh, config.microbatch_size, 1), config.train.accumulation
    data = eval_batches(corpus, config.data, config.data.batch_size, None, rows, parts)
    with contextlib.closing(data):
        for arrays in data:
            batch = Batch(**{name: array[0] for name, array in shard_batch(arrays, mesh, 1).items()})
            real_BT = batch.segments > 0
            real_BT = real_BT if domain is None else real_BT & (batch.domains == domain)
            if real_BT.any():  # of all processes' rows
                break
    return batch, real_BT


def _compared(
    config: ModelConfig,
    variables: Variables,
    before: ModelConfig,
    trained: Variables,
    batch: Batch,
    real_BT: Bool[Array, "B T"],
) -> dict[str, Any]:
    """The largest difference between the two models' logits on these tokens of a batch, for each way to give slots,
    without noise."""
    graphs = abstract_model(config)[0], abstract_model(before)[0]

    @jax.jit
    def compare(now: Variables, then: Variables, batch: Batch, real_BT: Array) -> tuple[dict[str, Array], Array]:
        real_BT1 = real_BT[..., None]
        logits = lambda graph, of, mode: jnp.where(  # noqa: E731
            real_BT1, nnx.merge(graph, of.params, of.model_state)(batch, mode=mode).logits, 0
        )
        differences = {
            mode: jnp.abs(logits(graphs[0], now, mode) - logits(graphs[1], then, mode)).max() for mode in MODES
        }
        return differences, jnp.abs(logits(graphs[1], then, "generate")).max()

    differences, largest = jax.block_until_ready(compare(variables, trained, batch, real_BT))
    return {
        "tokens_compared": int(real_BT.sum()),
        "logit_difference": {mode: float(each) for mode, each in differences.items()},
        "largest_logit": float(largest),
    }


@contextlib.contextmanager
def _named(run: Path) -> Iterator[None]:
    """Requests that fail say which run they are about."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"--init-from={run}: {error}") from None
    except OSError as error:  # a folder on the way that may not be entered, a name that is too long
        raise RequestError(f"--init-from={run}: could not be read: {error.strerror}") from None
