"""Run folders as one page: figures, token explorer, alerts. Reads what runs left behind and computes no model."""
