"""What every format shares: recognising one, the keys of the model's tensors, the geometry that they imply.

Imports: files.
"""
