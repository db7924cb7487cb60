"""The proof that a bundle equals its model: cases, bars, comparison, diagnosis, report.

Imports: arithmetic, policies, precision, source, weights; of ki_edge: bundle, checkpoints, checkpoints.layout, files,
model, policy, recordings; of ki_runtime: backends, policy.
"""
