"""Gradient estimators against the exact gradient (exact_gradient.py); papers' tables, recomputed (reproduction.py)."""
