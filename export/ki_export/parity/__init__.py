"""The proof that a bundle equals its model: cases, bars, comparison, diagnosis, report."""
