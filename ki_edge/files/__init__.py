"""Reading and writing files safely: bounded sizes, atomic replacement, folders published in one step.

Imports: nothing.
"""
