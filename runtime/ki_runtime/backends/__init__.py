"""The seam between policy and engines: sessions, the list of engines, ONNX Runtime."""
