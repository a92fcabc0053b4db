"""Floor 6: state, optimizer, step, checkpoints, the training loop and evaluation."""
