"""The GPU: CUDA calls, memory, identity, ONNX Runtime's CUDA session."""
