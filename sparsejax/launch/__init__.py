"""Floor 8: jobs. Prints the script or manifest that trains a config on this machine, SLURM, Kubernetes or a TPU VM."""
