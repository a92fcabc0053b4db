"""Config of a whole experiment, and the checks that need more than one part of it."""

from dataclasses import dataclass, field
from typing import Any, Optional

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import choice
from sparsejax.base.sharding import MeshConfig
from sparsejax.blocks.spec import BlockSpec
from sparsejax.data.config import DataConfig
from sparsejax.data.tasks import TASKS, Classify
from sparsejax.memory.config import MemorySpec
from sparsejax.model.config import ModelConfig
from sparsejax.model.heads import HEADS, Classes
from sparsejax.model.tables import layers_of
from sparsejax.nn.table import Storage
from sparsejax.ops.rows import kept_rows
from sparsejax.train.optimizer import OPTIMIZERS, Optimizer, learning_rate_at


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 1000  # optimizer steps
    seed: int = 0  # of parameters, data order and noise
    log_every: int = 10  # steps per row of metrics.jsonl
    accumulation: int = 1  # microbatches per step; the batch is that of data.batch_size either way
    consistency: Optional[float] = None  # α of THOR: two passes that draw apart, and α · how far they disagree
    max_nonfinite: int = 5  # steps in a row with a non-finite loss or gradient (each is skipped) before the run stops
    profile: tuple[int, ...] = ()  # (first, last): steps to write a profiler trace of
    trace: tuple[int, ...] = ()  # steps whose routing decisions are written, token by token, to traces/STEP.npz
    tensorboard: bool = True  # write event files, too

    def __post_init__(self):
        for name in ("steps", "log_every", "accumulation", "max_nonfinite"):
            _at_least_one(self, name)
        if not 0 <= self.seed < 2**32:
            raise ConfigError("seed", f"{self.seed} is outside 0 … 2³² − 1")
        if self.consistency is not None and self.consistency < 0:
            raise ConfigError("consistency", f"{self.consistency} is negative; allowed: None (one pass), 0 or more")
        if self.profile and not (len(self.profile) == 2 and 0 < self.profile[0] <= self.profile[1] <= self.steps):
            raise ConfigError(
                "profile", f"{self.profile}: two steps first <= last within 1 … train.steps={self.steps}, or ()"
            )
        outside = [step for step in self.trace if not 0 < step <= self.steps]
        if outside:
            raise ConfigError("trace", f"{outside[0]} is not one of the steps 1 … train.steps={self.steps}")

    @property
    def passes(self) -> int:
        """Forward and backward passes of a step over every token."""
        return 1 if self.consistency is None else 2


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = 200  # steps; the last step is always evaluated
    batches: Optional[int] = None  # batches of one evaluation; None: the whole validation split
    passages: int = 8  # validation rows that evaluations in training tell of token by token; 0: none

    def __post_init__(self):
        for name in ("every", "batches"):
            _at_least_one(self, name)
        if self.passages < 0:
            raise ConfigError("passages", f"{self.passages} is negative; allowed: 0 (none) or more")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 200  # steps; the last step is always saved
    keep: int = 2  # the newest that are kept
    keep_every: Optional[int] = None  # besides, steps divisible by this are kept for good

    def __post_init__(self):
        for name in ("every", "keep", "keep_every"):
            _at_least_one(self, name)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: Optimizer = choice(OPTIMIZERS, "adamw")
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        try:
            learning_rate_at(self.optimizer, self.train.steps)
        except ConfigError as error:
            raise error.below("optimizer") from None
        try:
            self.model.streams.check_training(self.model.num_layers)
        except ConfigError as error:
            raise error.below("model.streams") from None
        self._check_task()
        if self.train.consistency is not None and self.model.exits.depths:
            raise ConfigError("train.consistency", f"{self.train.consistency} with model.exits; allowed: None")
        if self.train.consistency is not None and self.model.halting.by_step:
            message = f"{self.train.consistency} with a halting that loses at every step; allowed: None"
            raise ConfigError("train.consistency", message)
        if self.mesh.data != -1:  # else once the devices are known: the loop replaces `mesh` and comes here again
            self._check_rows()
            self._check_splits()
            self._check_groups()

    def unused(self) -> dict[str, str]:
        routed = any(spec.has_router for _, spec in self._used_specs())
        return {} if routed else {"train.trace": "the model has no routers"}

    def _check_task(self) -> None:
        """Raises `ConfigError` unless what the model sees and scores is what it is to predict."""
        head, task = self.model.head, self.data.task
        if isinstance(head, Classes) != isinstance(task, Classify):
            told = f"{HEADS.name_of(head)} with data.task={TASKS.name_of(task)}"
            raise ConfigError("model.head", f"{told}; head=classes and task=classify go together")
        if isinstance(head, Classes) and isinstance(task, Classify) and head.classes != task.classes:
            raise ConfigError("model.head.classes", f"{head.classes} is not data.task.classes={task.classes}")
        if isinstance(head, Classes) and head.pool == "first" and self.model.causal:
            raise ConfigError("model.head.pool", "first: it sees no other token of a causal model; allowed: mean")
        causal = self.model.causal
        if causal == self.data.task.sees_targets or self.data.task.whole_rows:
            return
        fit = [name for name, task in TASKS.items() if task.whole_rows or task.sees_targets == causal]
        allowed = f"with model.causal={str(causal).lower()} data.task can be {' or '.join(fit)}"
        if causal:
            name = TASKS.name_of(self.data.task)
            raise ConfigError("data.task", f"{name}: tokens would see those before them alone; {allowed}")
        raise ConfigError("model.causal", f"false: a token would see its own target; {allowed}")

    @property
    def microbatch_size(self) -> int:
        """Rows of one microbatch, over all devices."""
        return self.data.batch_size // self.train.accumulation

    def _check_rows(self) -> None:
        parts = self.train.accumulation * self.mesh.batch_shards
        if self.data.batch_size % parts:
            lower = self.data.batch_size // parts * parts
            near = ", ".join(str(n) for n in (lower, lower + parts) if n)
            raise ConfigError(
                "data.batch_size",
                f"{self.data.batch_size} rows do not split evenly over train.accumulation={self.train.accumulation} "
                f"× mesh.data={self.mesh.data} × mesh.expert={self.mesh.expert} = {parts} parts; nearest: {near}",
            )

    def _check_splits(self) -> None:
        """Explicit meshes split arrays evenly, so each split axis must be a multiple of its mesh axis."""
        model, mesh, rules = self.model, self.mesh, self.mesh.rules
        kv_name = "model.num_heads" if model.num_kv_heads is None else "model.num_kv_heads"
        _divides(model.d_model, "model.d_model", rules.embed, mesh)
        _divides(model.num_heads, "model.num_heads", "tensor", mesh)
        _divides(model.kv_heads, kv_name, "tensor", mesh)
        _divides(model.vocab_size, "model.vocab_size", "tensor", mesh)
        for name, spec in self._used_specs():
            for key, (size, axis) in spec.splits(model).items():
                # Activations of the hidden width are split whatever the rule for its parameters.
                mesh_axis = rules.experts if axis == "experts" else "tensor"
                whole = axis == "experts" and hasattr(spec, "replicated")
                otherwise = "; replicated=true gives every device all of them" if whole else ""
                _divides(size, f"model.blocks.{name}.{key}", mesh_axis, mesh, otherwise)
        for name, memory in model.memory.items():
            for key, size in memory.splits(model).items():
                _divides(size, f"model.memory.{name}.{key}", "tensor", mesh)
            self._check_table(name, memory)

    def _check_table(self, name: str, memory: MemorySpec) -> None:
        """A table that is shared out has as many rows, or features, on every device."""
        key = f"model.memory.{name}"
        rows, width = kept_rows(memory.rows(self.model.vocab_size)), memory.row_width(self.model)
        sizes: dict[Storage, int] = {"rows": rows, "host": rows, "features": width}
        what = memory.storage
        if what in sizes and sizes[what] % self.mesh.batch_shards:
            across = f"mesh.data={self.mesh.data} × mesh.expert={self.mesh.expert} devices"
            message = (
                f"{sizes[what]} {'features' if what == 'features' else 'rows'} are not shared out evenly over {across}"
            )
            raise ConfigError(f"{key}.storage", f"{message}; allowed: another number of them, or storage=replicated")
        layers = len(layers_of(self.model, name))
        stored = (1 if memory.shared else layers) * rows
        tokens = self.data.batch_size * self.data.sequence_length * self.train.passes
        read = layers * memory.address.lookups * tokens
        if stored + read >= 2**31:  # rows are sorted by int32 keys, and what stands for nothing has keys beyond them
            message = (
                f"{stored:,} rows of {layers} layers and {read:,} lookups of a step are more than an int32 can number"
            )
            raise ConfigError(f"{key}.address", f"{message}; allowed: less than 2³¹ together")

    def _check_groups(self) -> None:
        rows = self.microbatch_size // self.mesh.batch_shards
        for name, spec in self._used_specs():
            try:
                spec.check_tokens(rows * self.model.tokens_of(name).room(self.data.sequence_length))
            except ConfigError as error:
                raise error.below(f"model.blocks.{name}") from None

    def _used_specs(self) -> list[tuple[str, BlockSpec]]:
        return [(name, self.model.blocks[name]) for name in sorted(set(self.model.positions.values()))]


def _divides(size: int, key: str, axis: Optional[str], mesh: MeshConfig, otherwise: str = "") -> None:
    """Raises unless the mesh axis (None: no split) splits `size` evenly; says which axis sizes would."""
    if axis is not None and size % getattr(mesh, axis):
        fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ConfigError(
            key,
            f"{size} is not divisible by mesh.{axis}={getattr(mesh, axis)}; sizes of mesh.{axis} that fit: {fits}"
            + otherwise,
        )


def _at_least_one(config: Any, name: str) -> None:
    value = getattr(config, name)
    if value is not None and value < 1:
        raise ConfigError(name, f"{value} is less than 1")
