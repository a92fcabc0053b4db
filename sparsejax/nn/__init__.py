"""Floor 2: modules that own parameters, and the dimensions they share."""
