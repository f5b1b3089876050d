"""Searchable galleries of images: metrics, the vector index, the gallery and its page."""
