"""Is every kernel right and fast on this card? Run by scripts/gpu_check.sh; all but the launch runs without one."""
