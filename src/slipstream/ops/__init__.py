"""Tensors in, tensors out. One folder an op, each with a plain PyTorch reference that documents it."""
