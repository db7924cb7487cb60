"""JAX (orbax) checkpoints: names, arrays in zarr stores, openpi's layout of them. tensorstore at first use.

Imports: checkpoints.layout.
"""
