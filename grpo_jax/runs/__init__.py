"""A run's directory: log (log.py), checkpoints, restoring (restore.py), files, and what is shown (display.py)."""
