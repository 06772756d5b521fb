"""The token store: what a run trains on, prepared once, addressed by index, fixed by one hash (DESIGN §9)."""
