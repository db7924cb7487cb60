"""From a checkpoint to a verified bundle of three ONNX graphs: ki-export and the order of its work.

Imports: graphs, parity, passes, policies, precision, source, weights; of ki_edge: bundle, checkpoints, files; of
ki_runtime: gpu, trt.
"""
