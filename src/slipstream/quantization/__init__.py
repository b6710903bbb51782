"""Make weights small: which of a checkpoint's tensors are converted, and a folder in which they are."""
