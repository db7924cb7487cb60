"""The GPU without a framework: CUDA calls, memory, identity, ONNX Runtime's CUDA session. cuda-python at first use.

Imports: backends; of ki_edge: bundle.
"""
