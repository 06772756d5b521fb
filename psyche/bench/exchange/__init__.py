"""Whole exchanges between processes on shaped links, with the rivals in the same run."""
