"""Measurements, with the rival in the same run."""
