"""Floor 4: the language model: embedding, a stack of named blocks with a scanned pattern, head."""
