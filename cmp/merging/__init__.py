"""Model merging: which weights are combined, and how (spec 4)."""
