"""What several tests share: tiny models, recipes and texts, processes, a simulated accelerator."""
