"""One thread: the tests' matrices are small, and tests run beside each other."""

import torch

torch.set_num_threads(1)
