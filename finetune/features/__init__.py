"""Features of frozen networks: engines, extraction, the store, nearest neighbours."""
