"""TensorRT: engines compiled from a bundle's graphs, kept in the bundle, and run on the device.

`api` holds every difference between TensorRT, TensorRT-RTX and the lean runtime; `profiles` the shapes that an engine
accepts; `engines` what is on disk and whether it fits this machine; `build` compiles. Nothing is imported before use.

Imports: backends, gpu; of ki_edge: bundle, files, policy.
"""
