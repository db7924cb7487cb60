"""Recorded data as batches: datasets, mixtures, text samples, augmentation, tokens, cache.

Imports: of ki_edge: checkpoints, files, model, policy, recordings, train.step; of ki_export: policies, source.
"""
