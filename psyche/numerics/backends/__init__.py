"""Backends for codecs and outer step, all with the same bits: PyTorch (the definition), native CPU code, CUDA."""
