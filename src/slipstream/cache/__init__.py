"""The KV cache: what each layer needs (`spec`), who owns which page (`pages`), and the tensors (`storage`)."""
