"""Recorded data as batches: datasets, mixtures, text samples, augmentation, tokens, cache.

Imports: checkpoints, files, model, planning, policy, recordings, train.step; of ki_export: policies, source.
"""
