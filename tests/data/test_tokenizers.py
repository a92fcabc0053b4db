"""Tokenizers: round trips, what they leave out, and files that are none."""

import io

import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.data.tokenizers import load_tokenizer

TEXT = "def größe(x):\n    return x  # 日本 \U0001f600\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    import sentencepiece
    import tokenizers

    folder = tmp_path_factory.mktemp("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator([TEXT] * 20, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.enable_truncation(5)
    model.save(str(folder / "tokenizer.json"))

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "return the cat"] * 30),
        model_writer=out,
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "words.model").write_bytes(out.getvalue())
    return folder


def test_bytes():
    tokenizer = load_tokenizer(None)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint8 and bytes(ids) == TEXT.encode() and tokenizer.decode(ids.tolist()) == TEXT
    assert tokenizer.is_bytes and tokenizer.vocab_size == 256
    assert tokenizer.decode([0xE6, 0x97]) == "\ufffd"
    assert tokenizer.encode("\ud800").tolist() == [ord("?")]


def test_tokenizer_json_round_trips_without_its_special_tokens_and_truncation(files):
    tokenizer = load_tokenizer(str(files / "tokenizer.json"))
    ids = tokenizer.encode(TEXT * 3)
    assert len(ids) > 5 and 0 not in ids
    assert tokenizer.decode(ids) == TEXT * 3
    assert ids.max() < tokenizer.vocab_size <= 300 and not tokenizer.is_bytes


def test_sentencepiece_round_trips(files):
    tokenizer = load_tokenizer(str(files / "words.model"))
    ids = tokenizer.encode("the cat sat on a mat")
    assert tokenizer.decode(ids) == "the cat sat on a mat"
    assert ids.max() < tokenizer.vocab_size and not tokenizer.is_bytes


def test_fingerprints_tell_files_apart(files):
    names = [None, str(files / "tokenizer.json"), str(files / "words.model")]
    assert len({load_tokenizer(name).fingerprint for name in names}) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.json", "cannot read .*gone.json.*No such file"),
        ("gone.model", "cannot read .*gone.model.*No such file"),
        ("bad.json", "is no Hugging Face tokenizer.json"),
        ("bad.model", "is no SentencePiece model"),
        ("words.txt", "neither a tokenizer.json nor a SentencePiece .model"),
    ],
)
def test_bad_files_are_one_line_errors(tmp_path, name, message):
    for bad in ("bad.json", "bad.model"):
        (tmp_path / bad).write_text('{"not": "one"}')
    with pytest.raises(ConfigError, match=message) as error:
        load_tokenizer(str(tmp_path / name))
    assert error.value.key == "data.tokenizer" and "\n" not in str(error.value)
