"""The seam between policy and engines: sessions, the list of engines, ONNX Runtime on the CPU.

Imports: of ki_edge: bundle, files.
"""
