"""Models: checkpoints of any origin, towers, the classifier under training, the diffusion prior."""
