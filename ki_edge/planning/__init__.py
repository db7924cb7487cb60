"""What training is told, recipes for it, and what it would take by arithmetic: memory, communication, time. No PyTorch.

Imports: checkpoints.layout.
"""
