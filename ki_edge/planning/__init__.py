"""What training would take, by arithmetic from a model's shapes: memory, communication, time. Without PyTorch.

Imports: checkpoints.layout.
"""
