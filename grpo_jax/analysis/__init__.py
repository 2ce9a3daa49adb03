"""What runs' files say: statistics, tables, plots."""
