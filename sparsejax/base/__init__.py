"""Floor 0: what every other floor leans on. Imports nothing of sparsejax but itself."""
