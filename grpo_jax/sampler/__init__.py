"""Parameters, prompts and noise names to completions and their log-probabilities."""
