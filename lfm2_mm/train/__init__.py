"""Training: objectives, packing and the trainer, for every modality; data belongs to frontends."""
