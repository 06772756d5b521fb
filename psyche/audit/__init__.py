"""Repeat a contribution, compare, and say what was found."""
