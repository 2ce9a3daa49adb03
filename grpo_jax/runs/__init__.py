"""A run's directory: the log (log.py), checkpoints (checkpoints.py), files (files.py), what is shown (display.py)."""
