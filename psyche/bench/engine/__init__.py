"""How fast a node trains in a run, beside the same model in a plain PyTorch loop and in ``transformers.Trainer``."""
