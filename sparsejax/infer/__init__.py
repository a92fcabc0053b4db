"""Floor 7: text from a trained model: sampling, decoding with a key/value cache, the `generate` command."""
