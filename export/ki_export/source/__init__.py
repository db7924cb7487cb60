"""A checkpoint before its export: opened, examined, described."""
