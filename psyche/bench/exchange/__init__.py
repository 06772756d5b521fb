"""Whole exchanges between processes, on links as bad as one likes, with the rivals in the same run."""
