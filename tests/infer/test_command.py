"""The `generate` command on a saved run, and `sample_text`."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from sparsejax import cli
from sparsejax.base import devices
from sparsejax.base.config import to_json
from sparsejax.base.sharding import MeshConfig
from sparsejax.data.config import DataConfig
from sparsejax.data.tokenizers import ByteTokenizer
from sparsejax.infer.text import START, sample_text
from sparsejax.model.exits import ExitHeads
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.restore import restore_variables
from sparsejax.train.state import init_state, make_optimizer

from tiny import CUBE, DENSE, mesh_of

CONFIG = ExperimentConfig(
    model=dataclasses.replace(DENSE, vocab_size=256, repeats=2, exits=ExitHeads(layers=(1,))),
    data=DataConfig(name="synthetic", sequence_length=16, batch_size=8),
)


@pytest.fixture(scope="module")
def state():
    with jax.set_mesh(mesh_of((1, 1, 1))):
        return jax.jit(lambda: init_state(CONFIG, make_optimizer(CONFIG)))()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, state):
    """A run of one device with checkpoints of steps 3 and 5, the first of which has zeros for parameters."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(to_json(CONFIG, {}, {}))
    checkpoints = Checkpoints(folder / "checkpoints", every=1, keep=2)
    checkpoints.save(3, dataclasses.replace(state, params=jax.tree.map(lambda a: 0 * a, state.params)), {})
    checkpoints.save(5, state, {})
    checkpoints.close()
    return folder


@pytest.fixture
def generate(monkeypatch, capsys, run_folder):
    """Runs the command line; `generate.out` and `.err` hold what it printed."""
    monkeypatch.setattr(devices, "prepare_devices", lambda count: None)

    def generate(*flags, workdir=run_folder):
        status = cli.main(["generate", f"--workdir={workdir}", "--max-tokens=5", *flags])
        generate.out, generate.err = capsys.readouterr()
        return status

    return generate


class TestCommand:
    def test_json_is_the_last_line_and_the_same_on_any_mesh(self, generate, tmp_path):
        (tmp_path / "prompts.txt").write_text("über\n two\n", encoding="utf-8")
        flags = ("--prompt=def ", f"--prompts-file={tmp_path}/prompts.txt", "--temperature=0", "--format=json")
        assert generate(*flags) == 0
        result = json.loads(generate.out.splitlines()[-1])
        assert (result["step"], result["temperature"], result["max_tokens"]) == (5, 0.0, 5)
        assert result["tokens_per_second"] > 0
        assert [sample["prompt"] for sample in result["samples"]] == ["def ", "über", " two"]
        for sample in result["samples"]:
            whole = np.concatenate([ByteTokenizer().encode(sample["prompt"]), sample["tokens"]])
            assert len(sample["tokens"]) == 5 and sample["text"] == ByteTokenizer().decode(whole)
        assert generate(*flags, "--mesh=2,2,2") == 0
        assert json.loads(generate.out.splitlines()[-1])["samples"] == result["samples"]

    def test_what_early_exits_saved_is_told(self, generate):
        assert generate("--prompt=def ", "--exit-rule=entropy", "--exit-threshold=9", "--format=json") == 0
        exits = json.loads(generate.out.splitlines()[-1])["exits"]
        assert exits["histogram"] == {"1": 5} and exits["mean_layer"] == 1
        flops = exits["flops"]
        assert flops["compiled"] > 0 and flops["ideal"] == flops["padded"] < flops["full"]
        # By hand: a layer, the exit's head, keys and values of the layer that was skipped; then two layers and a head.
        d, ff, width, kv = 16, 32, 16, 8
        keys = sum(range(4, 9))
        layer = 2 * (2 * d * width + 2 * d * kv + 2 * d * ff)
        head, scores = 2 * 256 * d, 2 * 2 * width
        assert flops["ideal"] == 5 * (layer + head + 2 * 2 * d * kv) + keys * scores
        assert flops["full"] == 5 * (2 * layer + head) + 2 * keys * scores

    def test_evaluation_decodes_with_early_exits(self, run_folder, capsys):
        def evaluate(*flags):
            words = ["eval", f"--workdir={run_folder}", "--config.eval.batches=1", "--exit-rule=entropy", *flags]
            status = cli.main(words)
            out, err = capsys.readouterr()
            return (status, err) if status else json.loads(out.splitlines()[-1])

        never, always = evaluate("--exit-threshold=0"), evaluate("--exit-threshold=9", "--exit-policy=evict")
        assert never["exits"]["histogram"] == {"2": never["targets"]}
        assert always["exits"]["histogram"] == {"1": never["targets"]} and always["exit_rule"]["keys"] == "evict"
        assert never["cross_entropy"] != always["cross_entropy"] and never["tokens_per_second"] > 0
        assert never["exits"]["flops"]["ideal"] > never["exits"]["flops"]["full"] > always["exits"]["flops"]["ideal"]
        assert never["bits_per_byte"] == pytest.approx(never["cross_entropy"] / np.log(2))
        status, said = evaluate("--exit-policy=monotone")
        assert status == 2 and "asks no rule" in said and said.count("\n") == 1
        status, said = evaluate("--exit-threshold=-1")
        assert status == 2 and said.count("\n") == 1

    def test_drafts_change_nothing_but_the_time(self, generate):
        said = []
        for more in ((), ("--draft-layers=1", "--draft-length=2")):
            assert generate("--prompt=def ", "--temperature=0", "--format=json", *more) == 0
            said.append(json.loads(generate.out.splitlines()[-1]))
        assert said[0]["samples"] == said[1]["samples"] and said[0]["drafts"] is None
        assert set(said[1]["drafts"]["histogram"]) == {"1", "2", "3"} and 1 <= said[1]["drafts"]["mean_tokens"] <= 3

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--exit-rule=max_probs"], "known: max_prob, margin"),
            (["--exit-rule=max_prob", "--exit-threshold=2"], "exit threshold 2.0; allowed with max_prob: 0 to 1"),
            (["--exit-threshold=0.5"], "--exit-threshold has no effect without --exit-rule"),
            (["--exit-policy=monotone", "--exit-rule=margin"], "--exit-rule has no effect with --exit-policy=monotone"),
            (["--draft-length=3"], "--draft-length has no effect without --draft-layers"),
            (["--draft-layers=1", "--exit-rule=margin"], "--draft-layers with early exits"),
            (["--draft-layers=2"], "draft layers 2; allowed: 1 … 1"),
        ],
    )
    def test_flags_of_exits_that_cannot_be(self, generate, flags, said):
        assert generate(*flags) == 2
        assert said in generate.err and generate.err.count("\n") == 1 and not generate.out

    def test_text_is_printed_bare_and_the_chosen_step_is_used(self, generate):
        # Zero parameters give equal logits, of which the first token is taken: NUL.
        assert generate("--prompt=def ", "--step=3", "--temperature=0") == 0
        assert generate.out == "def " + 5 * "\0" + "\n"
        assert "step 3: 1 × 5 tokens" in generate.err

    def test_another_tokenizer_than_the_runs_is_refused(self, generate, run_folder, tmp_path):
        """Its ids would be read as other text."""
        shutil.copytree(run_folder, tmp_path / "run")
        environment = {"corpus": {"tokenizer": "0123456789abcdef"}}
        (tmp_path / "run" / "config.json").write_text(to_json(CONFIG, {}, environment))
        assert generate(workdir=tmp_path / "run") == 2
        assert "data.tokenizer" in generate.err and "was 0123456789ab" in generate.err

    def test_several_texts_have_headings(self, generate):
        assert generate("--prompt=a", "--prompt=b", "--step=3", "--temperature=0") == 0
        assert generate.out == f"───── 1 of 2 ─────\na{5 * chr(0)}\n\n───── 2 of 2 ─────\nb{5 * chr(0)}\n"

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--prompt=",), "--prompt='' has no tokens"),
            (("--prompts-file=missing.txt",), "--prompts-file=missing.txt: No such file"),
            (("--step=4",), "no checkpoint of step 4"),
            (("--config.model.d_model=32",), "checkpoint 5 is of another model"),
            (("--seed=4294967296",), "seed=4294967296"),
            (("--config.data.tokenizer=missing.json",), "cannot read 'missing.json'"),
        ],
    )
    def test_bad_requests_are_one_line_and_status_2(self, generate, flags, said):
        assert generate(*flags) == 2
        assert said in generate.err and generate.err.count("\n") == 1 and generate.out == ""

    @pytest.mark.parametrize(
        ("content", "said"),
        [(b"one\n\nthree\n", "line 2 is empty"), (b"", "line 1 is empty"), (b"\xff\n", "not UTF-8")],
    )
    def test_bad_prompt_files_are_told_apart(self, generate, tmp_path, content, said):
        (tmp_path / "prompts.txt").write_bytes(content)
        assert generate(f"--prompts-file={tmp_path}/prompts.txt") == 2
        assert said in generate.err

    def test_a_run_without_a_checkpoint_is_refused(self, generate, run_folder, tmp_path):
        (tmp_path / "config.json").write_text((run_folder / "config.json").read_text())
        assert generate(workdir=tmp_path) == 2
        assert "no checkpoint in" in generate.err


def test_variables_are_restored_onto_another_mesh(run_folder, state):
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, expert=2, tensor=2))
    mesh = mesh_of(CUBE)
    with jax.set_mesh(mesh):
        restored, _, step = restore_variables(config, run_folder, mesh)
    assert step == 5
    for found, want in zip(jax.tree.leaves(restored.params), jax.tree.leaves(state.params), strict=True):
        assert found.sharding.mesh == mesh
        np.testing.assert_array_equal(found, want)


def test_sample_text_takes_a_train_state_and_has_a_default_prompt(state):
    with jax.set_mesh(mesh_of((1, 1, 1))):
        result = sample_text(CONFIG, state, ByteTokenizer(), [], max_tokens=5, seed=1)
    (sample,) = result.samples
    assert sample.prompt == START and sample.text.startswith(START) and len(sample.tokens) == 5
