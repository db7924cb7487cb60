"""A checkpoint before its export: opened, examined, described; where it came from.

Imports: policies; of ki_edge: bundle, checkpoints, checkpoints.layout, checkpoints.peft, files, policy; of ki_runtime:
doctor.
"""
