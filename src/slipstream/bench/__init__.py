"""Measuring a model on this machine, and what the machine would allow: `slipstream bench`.

`work` says what a step must read and compute, `machine` how fast this one reads and computes, `measure` times the model,
`peer` puts transformers in its place, `start` times how it gets ready, and `report` brings them together.
"""
