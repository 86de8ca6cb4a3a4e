"""The hot paths: each file holds a formula in plain PyTorch and the Triton kernels that compute the same."""
