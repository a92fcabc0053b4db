"""The TFDS dataset of a Python library's source. TFDS wants every builder in a package of its own."""
