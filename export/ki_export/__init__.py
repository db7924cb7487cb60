"""From a checkpoint to a verified bundle of three ONNX graphs (ki-export)."""
