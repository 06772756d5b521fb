"""Nodes of different speeds in one run: who waits for whom."""
