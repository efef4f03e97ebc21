"""Exact and near duplicates of texts: `shingles` (texts to hashes) and `near` (MinHash). It needs NumPy alone."""
