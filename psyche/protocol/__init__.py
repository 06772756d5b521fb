"""The rules of a run, pure: no clock, no socket, no file, no torch (README.md)."""
