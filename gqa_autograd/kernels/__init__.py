"""TileLang kernels for sm_90a. They know tensors, not autograd. tile, forward and backward import tilelang, the rest does not."""
