"""The definitions in plain PyTorch: any device, up to float64. They are the CPU bodies of the operators and the truth of the tests."""
