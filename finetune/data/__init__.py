"""Images: where they are, how they are divided, decoded, augmented and checked."""
