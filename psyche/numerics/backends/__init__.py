"""Who computes the codecs and the outer step: PyTorch (the definition), native CPU code, CUDA. The same bits all."""
