"""Plots, and the self-contained HTML page about a run or an ablation."""
