"""Audits: replay contributions, compare, and report findings. See README.md."""
