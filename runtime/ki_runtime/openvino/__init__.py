"""OpenVINO on Intel's and other CPUs, GPUs and NPUs: a bundle's graphs behind the session seam.

Imports: of ki_edge: bundle, files; of ki_runtime: backends.
"""
