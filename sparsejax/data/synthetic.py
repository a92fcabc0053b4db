"""A tiny made-up corpus for tests and trials: four kinds of regular text, the same everywhere, nothing on disk."""

import hashlib
from collections.abc import Iterator
from typing import Optional

import numpy as np

from sparsejax.data.documents import SPLITS, Document, Split

COUNTS: dict[Split, int] = {"train": 240, "validation": 24}
SEED = {"train": 1, "validation": 2}


def _text(domain: str, a: int, b: int, length: int) -> str:
    if domain == "count":
        return " ".join(str(a % 50 + n * (1 + b % 5)) for n in range(length))
    if domain == "alphabet":
        return "".join(chr(97 + (a + n * (1 + b % 3)) % 26) for n in range(length * 3))
    if domain == "pairs":
        return "".join(f"({chr(97 + (a + n) % 7)}{chr(65 + (a + n) % 7)})" for n in range(length))
    return (f"say {chr(97 + a % 26)}{chr(97 + b % 26)} again, " * length)[: length * 4]


class SyntheticSource:
    """Each domain is one kind of text."""

    name: str = "synthetic"
    domains: tuple[str, ...] = ("alphabet", "count", "echo", "pairs")
    python: Optional[str] = None

    def __init__(self):
        texts = (f"{split}\0{document.text}\0" for split in SPLITS for document in self.documents(split))
        self.hash = hashlib.sha256("".join(texts).encode()).hexdigest()

    def documents(self, split: Split) -> Iterator[Document]:
        """Documents of 80 to 640 characters; the raw bits of Philox are the same in every NumPy."""
        bits = np.random.Philox(SEED[split]).random_raw(COUNTS[split] * 3).reshape(-1, 3)
        for number, (a, b, length) in enumerate(bits.tolist()):
            domain = number % len(self.domains)
            yield Document(_text(self.domains[domain], a % 1000, b % 1000, 40 + length % 120), domain)
