"""Where a bundle's weights lie: shared, copied, converted, quantised."""
