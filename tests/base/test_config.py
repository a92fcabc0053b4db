"""The config bridge on a small schema of its own: types, suggestions, choices, files, provenance, JSON."""

import copy
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from ml_collections import ConfigDict

from sparsejax.base.config import (
    ABSENT,
    choose,
    diff,
    from_config_dict,
    from_json,
    leaves,
    load,
    to_config_dict,
    to_json,
    unused,
)
from sparsejax.base.errors import ConfigError, RequestError
from sparsejax.base.registry import Registry, choice, choices


@dataclass(frozen=True, kw_only=True)
class Adam:
    learning_rate: float = 1e-3
    beta: float = 0.9
    decay_groups: tuple[str, ...] = ("dense",)

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ConfigError("learning_rate", f"must be more than 0, not {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class Factor:
    learning_rate: float = 1e-2
    factored: bool = True


OPTIMIZERS = Registry("optimizer", {"adam": Adam, "factor": Factor})


@dataclass(frozen=True, kw_only=True)
class Softmax:
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    bias: float | None = None


SCORES = Registry("score", {"softmax": Softmax, "sigmoid": Sigmoid})


@dataclass(frozen=True, kw_only=True)
class Dense:
    hidden: int = 4


@dataclass(frozen=True, kw_only=True)
class Sparse:
    num_experts: int = 8
    capacity_factor: float = 1.25
    score: Softmax | Sigmoid = choice(SCORES, "softmax")

    def __post_init__(self):
        if self.num_experts < 1:
            raise ConfigError("num_experts", f"must be at least 1, not {self.num_experts}")


@dataclass(frozen=True, kw_only=True)
class Table:
    rows: int


BLOCKS = Registry("block", {"dense": Dense, "moe": Sparse, "table": Table})


@dataclass(frozen=True, kw_only=True)
class Model:
    d_model: int = 16
    pattern: tuple[str, ...] = ("dense", "moe")
    head: Literal["tied", "untied"] = "tied"
    softcap: float | None = None
    blocks: dict[str, Any] = choices(BLOCKS, dense=Dense(), moe=Sparse())

    def unused(self) -> dict[str, str]:
        return {f"blocks.{name}": "no layer names it" for name in self.blocks if name not in self.pattern}


@dataclass(frozen=True, kw_only=True)
class Data:
    name: str = "stdlib"
    path: str | None = None
    fraction: float = 0.05
    shuffle: bool = True

    def unused(self) -> dict[str, str]:
        return {} if self.path else {"fraction": "only data.path has a validation split of its own"}


@dataclass(frozen=True, kw_only=True)
class Root:
    steps: int = 100
    trace: tuple[int, ...] = ()
    every: int | None = None
    split: Literal["a", "b"] | None = None
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Adam | Factor = choice(OPTIMIZERS, "adam", beta=0.8)


@pytest.fixture
def c() -> Any:
    return to_config_dict(Root())


def override(*pairs, file=None):
    return load(Root, file, pairs)


def build(c):
    return from_config_dict(Root, c)


# ---- the bridge


def test_round_trip_is_exact_and_every_field_is_there(c):
    assert isinstance(c, ConfigDict)
    assert c.is_locked
    assert c.to_dict()["optimizer"] == {"name": "adam", "learning_rate": 1e-3, "beta": 0.8, "decay_groups": ("dense",)}
    assert c.model.blocks.moe.score.name == "softmax"
    assert c.every is None
    assert build(c) == Root()
    assert from_config_dict(Root, c.to_dict()) == Root()
    assert build(ConfigDict({"steps": 3, "trace": [1, 2]})) == Root(steps=3, trace=(1, 2))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("steps", 7, 7),
        ("every", 5, 5),
        ("every", None, None),
        ("split", "b", "b"),
        ("trace", [1, 2], (1, 2)),
        ("model.softcap", 30, 30.0),
        ("model.pattern", ["moe"], ("moe",)),
        ("data.path", "x.txt", "x.txt"),
        ("data.shuffle", False, False),
    ],
)
def test_accepted_values_get_the_exact_type(c, path, value, expected):
    group, _, key = path.rpartition(".")
    (c[group] if group else c)[key] = value
    found = leaves(build(c))[path]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("steps", 2.5, "an int"),
        ("steps", 2.0, "an int"),
        ("steps", True, "an int"),
        ("steps", "3", "an int"),
        ("steps", None, "an int"),
        ("every", "3", "none or an int"),
        ("trace", 3, "a tuple, each item an int"),
        ("trace", (1, 2.5), "a tuple, each item an int"),
        ("trace", "12", "a tuple, each item an int"),
        ("model.d_model", [1], "an int"),
        ("model.softcap", "x", "none or a finite float"),
        ("model.softcap", False, "none or a finite float"),
        ("model.softcap", float("nan"), "none or a finite float"),
        ("model.softcap", float("-inf"), "none or a finite float"),
        ("model.softcap", 10**400, "none or a finite float"),
        ("model.head", "teid", "one of: tied, untied. Did you mean 'tied'?"),
        ("data.shuffle", 1, "true or false"),
        ("data.name", 3, "a string"),
        ("split", "c", "none or one of: a, b"),
        ("model", 3, "a group of settings: d_model"),
        ("model.blocks", 3, "maps free names"),
        ("optimizer", 3, "known: adam, factor"),
        ("optimizer.name", "adm", "known: adam, factor. Did you mean 'adam'?"),
        ("optimizer.name", ["adam"], "known: adam, factor"),
        ("model.blocks.moe.score.name", "softmix", "known: softmax, sigmoid. Did you mean 'softmax'?"),
    ],
)
def test_wrong_values_name_key_value_and_what_is_allowed(c, path, value, allowed):
    *groups, key = path.split(".")
    node = c
    for group in groups:
        node = node[group]
    with pytest.raises(ConfigError) as set_directly:
        setattr(node, key, value)
    nested = value
    for part in reversed(path.split(".")):
        nested = {part: nested}
    with pytest.raises(ConfigError) as in_a_dict:
        from_config_dict(Root, nested)
    for error in (set_directly.value, in_a_dict.value):
        assert error.key in (path, f"{path}.name")
        assert allowed in str(error)
        assert str(value) in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("step", "steps"),
        ("model.d_modle", "model.d_model"),
        ("modle.d_model", "model.d_model"),
        ("d_model", "model.d_model"),
        ("model.capacity_factor", "model.blocks.moe.capacity_factor"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimizer.learnin_rate", "optimizer.learning_rate"),
        ("model.blocks.moe.score.temprature", "model.blocks.moe.score.temperature"),
        ("modle", "model"),
        ("modle.zzz", "model"),
        ("model.blokcs.zzz", "model.blocks"),
        ("model.blocks.moe.temprature", "model.blocks.moe.score.temperature"),
        ("model.blocks.meo.num_experts", "model.blocks.moe.num_experts"),
    ],
)
def test_unknown_keys_suggest_the_nearest_path(path, near):
    with pytest.raises(ConfigError) as caught:
        override((path, "3"))
    assert caught.value.key == path
    assert f"Did you mean 'config.{near}'?" in str(caught.value)


def test_unknown_keys_in_python_name_the_whole_path(c):
    with pytest.raises(
        ConfigError, match=r"config\.model\.blocks\.moe\.num_expert: no such key.*blocks\.moe\.num_experts"
    ):
        c.model.blocks.moe.num_expert = 3
    with pytest.raises(AttributeError, match=r"config\.modle: no such key. Did you mean 'config\.model'"):
        c.modle.d_model = 3
    with pytest.raises(ConfigError, match=r"config\.zzz: no such key\. config has: steps, trace"):
        c.zzz = 3
    assert not hasattr(c, "zzz")


def test_post_init_errors_carry_the_path(c):
    c.model.blocks.moe.num_experts = 0
    with pytest.raises(ConfigError, match=r"config\.model\.blocks\.moe\.num_experts: must be at least 1, not 0"):
        build(c)
    with pytest.raises(ConfigError, match=r"config\.optimizer\.learning_rate: must be more than 0"):
        override(("optimizer.learning_rate", "-1"))


def test_references_and_copies_keep_the_checks(c):
    c.every = c.get_ref("steps")
    c.steps = 12
    assert build(c).every == 12
    c.data.name = c.get_ref("steps")
    with pytest.raises(ConfigError, match=r"config\.data\.name: 12 is not allowed; must be a string"):
        build(c)
    other = copy.deepcopy(to_config_dict(Root()))
    other.model.d_model = 3
    assert (build(other).model.d_model, Root().model.d_model) == (3, 16)
    with pytest.raises(ConfigError, match="Did you mean"):
        other.model.d_modle = 3


def test_schema_types_that_no_config_can_hold_are_refused():
    @dataclass(frozen=True, kw_only=True)
    class Bad:
        table: dict[str, int] = field(default_factory=dict)

    with pytest.raises(TypeError, match=r"Bad\.table"):
        to_config_dict(Bad())


# ---- choices


def test_switching_keeps_shared_values_that_were_set(c):
    c.optimizer.learning_rate = 0.5
    c.optimizer.name = "factor"
    c.optimizer.factored = False
    assert build(c).optimizer == Factor(learning_rate=0.5, factored=False)


def test_switching_takes_the_new_defaults_for_the_rest(c):
    c.optimizer.name = "factor"
    assert build(c).optimizer == Factor()
    c.optimizer.name = "adam"
    assert build(c).optimizer == Adam()


def test_switching_away_from_a_value_that_was_set_is_an_error(c):
    c.optimizer.beta = 0.7
    with pytest.raises(
        ConfigError, match=r"config\.optimizer\.beta: 0\.7 was set for 'adam', but 'factor' has no such key"
    ):
        c.optimizer.name = "factor"


def test_choose(c):
    c.optimizer = choose(OPTIMIZERS, "factor", learning_rate=1)
    assert build(c).optimizer == Factor(learning_rate=1.0)
    c.optimizer = Adam(beta=0.1)
    assert build(c).optimizer == Adam(beta=0.1)
    with pytest.raises(ConfigError, match=r"optimizer 'factor': facored: no such key. Did you mean 'factored'"):
        choose(OPTIMIZERS, "factor", facored=True)
    with pytest.raises(ConfigError, match="unknown optimizer 'fctor'"):
        choose(OPTIMIZERS, "fctor")
    with pytest.raises(
        ConfigError, match=r"config\.optimizer: this is a score, not of the kind optimizer; known: adam"
    ):
        c.optimizer = choose(SCORES, "softmax")


def test_one_node_in_two_places_is_two_nodes(c):
    c.model.blocks.other = c.model.blocks.moe
    c.model.blocks.other.num_experts = 2
    assert build(c).model.blocks["moe"].num_experts == 8
    assert build(c).model.blocks["other"].num_experts == 2


def test_mapping_takes_new_names_and_only_valid_choices(c: Any):
    c.model.blocks.big = choose(BLOCKS, "moe", num_experts=64)
    c.model.blocks.tiny = {"name": "dense", "hidden": 1}
    c.model.blocks.plain = "dense"
    del c.model.blocks.moe
    expected = {"dense": Dense(), "big": Sparse(num_experts=64), "tiny": Dense(hidden=1), "plain": Dense()}
    assert build(c).model.blocks == expected
    with pytest.raises(ConfigError, match=r"config\.model\.blocks\.big: 3 names no block; known: dense, moe, table"):
        c.model.blocks.big = 3
    with pytest.raises(ConfigError, match=r"config\.model\.blocks\.big\.num_expert: no such key"):
        c.model.blocks["big"].num_expert = 3
    with pytest.raises(ConfigError, match=r"config\.model\.blocks\.tiny\.hiden: no such key"):
        c.model.blocks.tiny = {"hiden": 3}
    c.model.blocks = {"only": {"name": "dense"}}
    assert build(c).model.blocks == {"only": Dense()}


def test_a_field_without_default_must_be_set(c):
    c.model.blocks.memory = choose(BLOCKS, "table")
    with pytest.raises(
        ConfigError, match=r"config\.model\.blocks\.memory\.rows: has no default and needs a value: an int"
    ):
        build(c)
    c.model.blocks.memory.rows = 9
    assert build(c).model.blocks["memory"] == Table(rows=9)


# ---- the command line


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("steps", "1_000", 1000),
        ("steps", "1e3", 1000),
        ("steps", "-3", -3),
        ("every", "4", 4),
        ("every", "none", None),
        ("trace", "3,4", (3, 4)),
        ("trace", "(3, 4)", (3, 4)),
        ("trace", "[3]", (3,)),
        ("trace", "()", ()),
        ("trace", "", ()),
        ("split", "None", None),
        ("split", "a", "a"),
        ("model.pattern", "dense,moe", ("dense", "moe")),
        ("model.pattern", "('moe', \"dense\",)", ("moe", "dense")),
        ("model.softcap", "3", 3.0),
        ("model.softcap", "1e-3", 1e-3),
        ("model.head", "untied", "untied"),
        ("data.shuffle", "False", False),
        ("data.shuffle", "1", True),
        ("data.path", "a,b=c", "a,b=c"),
        ("data.name", "none", "none"),
        ("optimizer.decay_groups", "dense,norm", ("dense", "norm")),
        ("model.blocks.moe.score.temperature", "2", 2.0),
    ],
)
def test_text_is_read_by_the_type_of_its_leaf(path, text, expected):
    loaded = override((path, text))
    found = leaves(loaded.config)[path]
    assert found == expected
    assert type(found) is type(expected)
    assert {key for key, source in loaded.provenance.items() if source == "command line"} == {path}


@pytest.mark.parametrize(
    ("path", "text", "allowed"),
    [
        ("steps", "2.5", "an int"),
        ("steps", "1e-3", "an int"),
        ("steps", "many", "an int"),
        ("every", "x", "none or an int"),
        ("trace", "1,x", "each item an int"),
        ("model.softcap", "nan", "a finite float"),
        ("optimizer.learning_rate", "inf", "'inf' is not allowed; must be a finite float."),
        ("optimizer.learning_rate", "1e999", "a finite float"),
        ("model.head", "untide", "Did you mean 'untied'?"),
        ("data.shuffle", "maybe", "true or false"),
        ("model", "3", "it is a group, set one of its own: d_model"),
        ("steps.foo", "3", "steps is a single value"),
        ("optimizer", "adem", "Did you mean 'adam'?"),
    ],
)
def test_wrong_text_is_named(path, text, allowed):
    with pytest.raises(ConfigError) as caught:
        override((path, text))
    assert caught.value.key in (path, f"{path}.name")
    assert allowed in str(caught.value)


@pytest.mark.parametrize("key", ["optimizer", "optimizer.name"])
@pytest.mark.parametrize("turn", [1, -1])
def test_choosing_does_not_depend_on_the_order_of_flags(key, turn):
    pairs = [(key, "factor"), ("optimizer.factored", "false"), ("optimizer.learning_rate", "0.5")][::turn]
    loaded = override(*pairs)
    assert loaded.config.optimizer == Factor(learning_rate=0.5, factored=False)
    assert {loaded.provenance[f"optimizer.{k}"] for k in ("name", "factored", "learning_rate")} == {"command line"}


def test_choices_inside_choices_and_new_names_on_the_command_line():
    loaded = override(
        ("model.blocks.big.score.bias", "0.5"),
        ("model.blocks.big.score", "sigmoid"),
        ("model.blocks.big.name", "moe"),
        ("model.blocks.plain", "dense"),
        ("model.pattern", "big,plain,dense,moe"),
    )
    assert loaded.config.model.blocks["big"] == Sparse(score=Sigmoid(bias=0.5))
    assert loaded.config.model.blocks["plain"] == Dense()
    assert loaded.provenance["model.blocks.big.num_experts"] == "default"
    with pytest.raises(ConfigError, match=r"config\.model\.blocks\.big\.num_experts: no such key"):
        override(("model.blocks.big.num_experts", "3"))


def test_the_last_of_two_overrides_counts():
    assert override(("steps", "3"), ("steps", "4")).config.steps == 4


# ---- files


@pytest.fixture
def write(tmp_path):
    def write(body, name="exp.py", head="def get_config():"):
        path = tmp_path / name
        lines = [
            f"from {__name__} import *",
            "from sparsejax.base.config import *",
            head,
            "    c = to_config_dict(Root())",
        ]
        path.write_text("\n".join([*lines, *(f"    {line}" for line in body), "    return c", ""]))
        return str(path)

    return write


def test_file_values_and_their_provenance(write):
    file = write(["c.steps = 7", "c.model.blocks.moe.num_experts = 8", "c.optimizer = choose(OPTIMIZERS, 'factor')"])
    loaded = override(("data.path", "x"), ("data.fraction", "0.05"), file=file)
    assert loaded.config.steps == 7
    sources = {path: source for path, source in loaded.provenance.items() if source != "default"}
    assert sources == {
        "steps": "file",
        "optimizer.name": "file",
        "data.path": "command line",
        "data.fraction": "command line",
    }


def test_file_argument(write):
    file = write(["c.steps = 7 if size == 'small' else 9"], head="def get_config(size='large'):")
    assert (override(file=file).config.steps, override(file=f"{file}:small").config.steps) == (9, 7)


def test_overrides_switch_a_choice_that_the_file_edited(write):
    file = write(["c.optimizer.learning_rate = 0.5"])
    loaded = override(("optimizer", "factor"), file=file)
    assert loaded.config.optimizer == Factor(learning_rate=0.5)
    assert loaded.provenance["optimizer.learning_rate"] == "file"
    with pytest.raises(ConfigError, match=r"config\.optimizer\.beta: 0\.3 was set for 'adam'"):
        override(("optimizer", "factor"), file=write(["c.optimizer.beta = 0.3"]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c.modle.d_model = 3", r"exp\.py:5: config\.modle: no such key. Did you mean 'config\.model'"),
        ("c.steps = 2.5", r"exp\.py:5: config\.steps: 2\.5 is not allowed; must be an int"),
        ("c.model.capacity_factor = 2.0", r"exp\.py:5: config\.model\.capacity_factor: .*blocks\.moe\.capacity_factor"),
        ("1 / 0", r"exp\.py:5: ZeroDivisionError: division by zero"),
        ("c = = 3", r"exp\.py:5: SyntaxError"),
        ("import no_such_module", r"exp\.py:5: ModuleNotFoundError: .*no_such_module"),
        ("c = 3", r"exp\.py: get_config\(\) returned 3, not what"),
    ],
)
def test_errors_in_a_file_name_file_and_line(write, line, message):
    with pytest.raises(RequestError, match=message):
        override(file=write([line]))


def test_files_that_are_no_config(write, tmp_path):
    file = write([])
    with pytest.raises(RequestError, match=r"exq\.py: no such file\. Did you mean '.*exp\.py'"):
        override(file=file.replace("exp", "exq"))
    with pytest.raises(RequestError, match=r"must be FILE\.py"):
        override(file=str(tmp_path))
    with pytest.raises(RequestError, match=r"exp\.py: get_config\('arg'\): TypeError: get_config\(\) takes 0"):
        override(file=f"{file}:arg")
    with pytest.raises(RequestError, match=r"defines no get_config"):
        override(file=write([], head="def other():"))
    assert not (tmp_path / "__pycache__").exists()


def test_a_plain_config_dict_is_checked_too(write):
    file = write(["from ml_collections import ConfigDict", "c = ConfigDict({'steps': 'x'})"])
    with pytest.raises(RequestError, match=r"config\.steps: 'x' is not allowed"):
        override(file=file)


# ---- settings without effect


def test_inert_settings_are_errors_only_when_someone_set_them(write):
    assert unused(Root()) == {"data.fraction": "only data.path has a validation split of its own"}
    assert override().config == Root()
    message = r"config\.data\.fraction: 0\.1 has no effect: only data\.path"
    with pytest.raises(ConfigError, match=message):
        override(("data.fraction", "0.1"))
    with pytest.raises(ConfigError, match=message):
        override(file=write(["c.data.fraction = 0.1"]))
    with pytest.raises(ConfigError, match=r"config\.data\.fraction: 0\.05 has no effect"):
        override(("data.fraction", "0.05"))
    assert override(("data.fraction", "0.1"), ("data.path", "x")).config.data.fraction == 0.1


def test_unused_groups_are_listed_leaf_by_leaf():
    assert set(unused(Root(model=Model(pattern=("dense",))))) == {
        "data.fraction",
        "model.blocks.moe.name",
        "model.blocks.moe.num_experts",
        "model.blocks.moe.capacity_factor",
        "model.blocks.moe.score.name",
        "model.blocks.moe.score.temperature",
    }
    with pytest.raises(
        ConfigError, match=r"config\.model\.blocks\.moe\.score\.temperature: 2\.0 has no effect: no layer"
    ):
        override(("model.pattern", "dense"), ("model.blocks.moe.score.temperature", "2"))


# ---- JSON, diff


def test_json_reproduces_config_and_provenance(write, tmp_path):
    file = write(
        ["c.model.blocks.big = choose(BLOCKS, 'moe', num_experts=3)", "del c.model.blocks.moe", "c.trace = 1, 2"]
    )
    pairs = ("model.pattern", "big,dense"), ("optimizer", "factor")
    first = override(*pairs, file=file)
    text = to_json(first.config, first.provenance, {"python": "3.11"})
    again = from_json(Root, text)
    assert (again.config, again.provenance, again.environment) == (first.config, first.provenance, {"python": "3.11"})
    assert json.loads(text)["config"]["model"]["blocks"]["big"]["name"] == "moe"

    saved = tmp_path / "config.json"
    saved.write_text(text)
    assert override(file=str(saved)) == again
    changed = override(("steps", "5"), file=str(saved))
    assert diff(first.config, changed.config) == [("steps", 100, 5)]
    assert changed.provenance == {**first.provenance, "steps": "command line"}
    assert override(("optimizer", "adam"), file=str(saved)).config.optimizer == Adam()


def test_json_that_is_no_run_record():
    for text in ("", "[]", "{}", '{"config": {}, "provenance": 3, "environment": {}}'):
        with pytest.raises(RequestError, match=r"config\.json: not the config\.json of a run"):
            from_json(Root, text)
    with pytest.raises(RequestError, match=r"a run: it has no 'provenance' and no 'environment'"):
        from_json(Root, '{"config": {}}')
    record = {"config": {"stepz": 3}, "provenance": {}, "environment": {}}
    with pytest.raises(RequestError, match=r"runs/a: config\.stepz: no such key. Did you mean 'config\.steps'"):
        from_json(Root, json.dumps(record), name="runs/a")


def test_json_files_that_cannot_be_read(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_bytes(b'{"config": "\xff"}')
    with pytest.raises(RequestError, match=r"config\.json: not the config.json of a run: it is not UTF-8 text"):
        load(Root, str(file))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(file), "read_text", refuse)  # root may read anything
    with pytest.raises(RequestError, match=r"config\.json: could not be read: Permission denied"):
        load(Root, str(file))


def test_diff_names_leaves_that_one_side_lacks():
    old, new = Root(), Root(optimizer=Factor())
    assert diff(old, old) == []
    assert diff(old, new) == [
        ("optimizer.name", "adam", "factor"),
        ("optimizer.learning_rate", 1e-3, 1e-2),
        ("optimizer.beta", 0.8, ABSENT),
        ("optimizer.decay_groups", ("dense",), ABSENT),
        ("optimizer.factored", ABSENT, True),
    ]
