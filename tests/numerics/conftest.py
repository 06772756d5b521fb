import torch

torch.set_num_threads(1)  # tests share the machine, and the bits must not depend on it
