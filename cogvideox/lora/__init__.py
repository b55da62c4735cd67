"""LoRA files: their formats, and adding them to the transformer's weights while these load."""
