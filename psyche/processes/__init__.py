"""Processes of this machine: a node, a coordinator, a standby; locks, hours, goodbyes."""
