"""The chain of certified rounds: storage, verification, views, and the credits that follow from it."""
