"""Several GPUs of one node as one engine: DeepSpeed's ZeRO (arXiv 1910.02054), with ranks led by this process."""
