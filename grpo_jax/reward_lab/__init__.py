"""Rewards compared and attacked before any training."""
