"""PEFT adapters over a base checkpoint, merged while reading. Imports: checkpoints.layout, files."""
