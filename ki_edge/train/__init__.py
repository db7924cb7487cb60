"""Training with knowledge insulation (ki-train), in PyTorch.

Imports: checkpoints, files, model, policy, recordings.
"""
