"""Training with knowledge insulation (ki-train), in PyTorch.

Imports: files, model, planning, train.data, train.parallel, train.step, train.watching.
"""
