"""Gradient estimators against the exact gradient, and printed tables against our own numbers."""
