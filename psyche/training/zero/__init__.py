"""Many GPUs of one node as one engine: DeepSpeed's ZeRO (arXiv 1910.02054), its ranks led by this process."""
