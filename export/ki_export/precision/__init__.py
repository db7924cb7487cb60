"""16 bits: the audit of ranges, the decision what is scaled or kept, the lowering."""
