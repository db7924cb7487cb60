"""Where a bundle's weights lie: shared, copied, converted, quantised; which of them were changed.

Imports: graphs, passes; of ki_edge: bundle, checkpoints, checkpoints.layout, files.
"""
