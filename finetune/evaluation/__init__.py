"""Predictions and judgements of finished models, and the choice between models."""
