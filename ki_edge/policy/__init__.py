"""What makes a model a policy: contract, prompt, FAST, normalisation, pictures, transforms. numpy at import.

Imports: files.
"""
