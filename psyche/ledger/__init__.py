"""The chain of certified rounds on disk: storage, verification, reports, and exchange between nodes."""
