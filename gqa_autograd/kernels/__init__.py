"""TileLang kernels for sm_90a. They know tensors, not autograd. config.py is plain data; the other files import tilelang."""
