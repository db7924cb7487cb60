"""From the model to ONNX graphs: wrappers, tracing, the checker."""
