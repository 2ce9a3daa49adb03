"""A run's directory: what is written to it and read back, its checkpoints, and what is shown while it is made."""
