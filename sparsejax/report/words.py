"""Tokens as text."""

import keyword
from typing import Optional

from sparsejax.base.errors import RequestError
from sparsejax.data.tokenizers import Tokenizer, load_tokenizer
from sparsejax.report.runs import Run


class TokenTexts:
    """The text of every id of a run; `⟨id⟩` where its tokenizer is not here."""

    def __init__(self, run: Run):
        self.tokenizer: Optional[Tokenizer] = None
        if run.config is not None:
            try:
                self.tokenizer = load_tokenizer(run.config.data.tokenizer)
            except (RequestError, OSError):
                self.tokenizer = None
        self.known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        token = int(token)
        if token not in self.known:
            self.known[token] = self._text(token)
        return self.known[token]

    def _text(self, token: int) -> str:
        if self.tokenizer is None or not 0 <= token < self.tokenizer.vocab_size:
            return f"⟨{token}⟩"
        text = self.tokenizer.decode([token])
        return f"⟨{token}⟩" if "\ufffd" in text else text


def token_class(text: str) -> str:
    """A rough class by its letters, as a reader of source code would name it."""
    bare = text.strip()
    if not bare:
        return "line end" if "\n" in text else "space"
    if bare.startswith("⟨"):
        return "other"
    if keyword.iskeyword(bare):
        return "keyword"
    if bare[0].isdigit():
        return "digit"
    if bare[0].isalpha():
        return "capital" if bare[0].isupper() else "letter"
    return {"_": "underscore"}.get(bare[0], _punctuation(bare[0]))


def _punctuation(sign: str) -> str:
    if sign in "()[]{}":
        return "bracket"
    if sign in "\"'`":
        return "quote"
    if sign in "#.,:;":
        return "separator"
    return "operator" if sign in "+-*/%=<>!&|^~@\\" else "other"
