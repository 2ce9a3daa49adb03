"""Plots of runs and ablations (plots.py, curves.py, completion_plots.py), and an HTML page about them (page.py)."""
