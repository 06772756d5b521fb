"""Coordinator, worker, auditor: they compose the parts below and own the effects (DESIGN §12)."""
