"""What outlives a process: checkpoints, state for joiners, exports."""
