"""Checkpoints on disk: what is in them, checked before anything is believed; and their tensors."""
