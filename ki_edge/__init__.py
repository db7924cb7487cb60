"""What export and runtime share: configuration, contracts, tokenizers, transforms, and the model itself."""
