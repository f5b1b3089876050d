"""Fine-tuning: the loop, its inputs, optimisation and checkpoints."""
