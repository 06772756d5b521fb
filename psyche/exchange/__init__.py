"""How payloads reach everyone who needs them (DESIGN §7)."""
