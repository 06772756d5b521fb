"""The DiLoCo algorithm on one node: replica, local update, outer step, and the single-process reference."""
