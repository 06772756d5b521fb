"""Check psyche on a GPU within minutes: ``scripts/gpu_check.sh`` runs it and explains it.

It imports only torch, numpy, transformers and cuda.core, so that it runs where psyche is not installed.
"""
