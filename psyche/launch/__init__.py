"""From a configuration to a run: manifest, protocol rules, and what it will cost."""
