"""How a round's payloads are exchanged and become an outer gradient: gather or sharded (README.md)."""
