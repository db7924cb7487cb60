"""PEFT adapters over a base checkpoint, merged while reading."""
