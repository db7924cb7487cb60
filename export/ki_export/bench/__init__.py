"""ki-bench: what a bundle costs on this machine, and how far that is from what the machine can do."""
