"""Recorded data as batches: datasets, mixtures, text samples, augmentation, tokens, cache."""
