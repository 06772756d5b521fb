"""A volunteer node in a run: train, exchange, vote, apply, report."""
