"""From the PyTorch model to ONNX graphs: wrappers, tracing, the checker. Imports: passes; of ki_edge: bundle, model."""
