"""Whether growing pays: grown runs against scratch runs of the same size, and of the best size, at equal loss."""
