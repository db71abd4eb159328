"""LoRA adapters in memory and in files, of any trainer: found, read, put on a model, merged and written."""
