"""Measuring which choices are fastest on this card for a model's weights: `slipstream tune`. What it finds, loads read
(ops/tuned.py)."""
