"""Graphs computed in exactly the types they declare, on the CPU: what float16 engines round, this rounds.

Imports: weights; of ki_edge: bundle, checkpoints; of ki_runtime: backends, policy.
"""
