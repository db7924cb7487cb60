"""Recorded episodes and model inputs, read from .npz files. Imports: files, policy."""
