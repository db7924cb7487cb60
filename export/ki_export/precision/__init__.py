"""16 bits: the audit of ranges, the decision what is scaled or kept, the lowering.

Imports: arithmetic, graphs, passes, policies, weights; of ki_edge: bundle, checkpoints, checkpoints.layout, files,
policy, recordings.
"""
