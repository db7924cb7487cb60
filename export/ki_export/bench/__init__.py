"""ki-bench: what a bundle costs on this machine, and how far that is from what the machine can do.

Imports: of ki_edge: bundle, checkpoints, files, model, policy; of ki_runtime: itself, backends, policy.
"""
