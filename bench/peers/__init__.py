"""Other people's full and compressed caches, on the same weights."""
