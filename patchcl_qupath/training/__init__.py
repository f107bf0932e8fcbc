"""How models are trained: PatchCL, self-training, CDCL."""
