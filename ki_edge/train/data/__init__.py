"""Recorded data as batches: datasets, mixtures, text samples, augmentation, tokens, cache.

Imports: of ki_edge: checkpoints, files, policy; ki_export.policies.
"""
