"""What is trained: LightningModules, one per task family."""
