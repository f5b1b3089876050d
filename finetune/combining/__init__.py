"""Several models as one: their answers or their weights averaged, and what tuning forgot."""
