"""Held-out loss of training with psyche beside a rival on the same data: one section for each question."""
