"""Pretrained networks: weights, stages, freezing, and the features read from them."""
