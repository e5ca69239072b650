"""Training and evaluation: data to targets, losses, the loop, and what a checkpoint is worth."""
