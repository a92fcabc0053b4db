"""Data: from text on disk to packed rows of tokens. NumPy only; the rows reach JAX in the training loop.

`corpus.open_corpus` turns a `DataConfig` into tokens on disk, `loader.batches` reads them as rows, in an order that is
a pure function of (seed, row number): the only state of the data pipeline is the step.
"""
