"""OpenVINO on Intel's and other CPUs, GPUs and NPUs: a bundle's graphs behind the session seam.

Imports: backends; of ki_edge: bundle, files.
"""
