"""How long a newcomer takes from its command to its first inner step, and what that costs the others."""
