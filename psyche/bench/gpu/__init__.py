"""Checks psyche on a GPU within minutes: scripts/gpu_check.sh runs it, and says how.

It imports nothing but torch, numpy, transformers and cuda.core, so that it runs where psyche is not installed.
"""
