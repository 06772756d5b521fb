"""Federated mode: a node trains on its own private text and publishes only differentially private pseudo-gradients."""
