"""LoRA in memory and in files: of any trainer, read, put on a model, merged and written."""
