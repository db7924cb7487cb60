"""Training with knowledge insulation (ki-train)."""
