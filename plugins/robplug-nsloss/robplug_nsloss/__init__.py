"""Regularisation of neural activation sensitivity (NsLoss) and of the Jacobian, and their kernels."""
