"""The transformer, assembled from the methods that the config names for each slot."""
