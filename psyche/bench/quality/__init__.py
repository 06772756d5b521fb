"""``psyche bench convergence --codecs``: what each codec costs in loss, against tokens, rounds and bytes."""
