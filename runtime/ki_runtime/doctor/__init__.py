"""ki-doctor: what this machine can run, what is missing, and the command that mends it.

Imports: backends, gpu, openvino, policy, trt; of ki_edge: bundle, checkpoints, checkpoints.layout, planning, policy.
"""
