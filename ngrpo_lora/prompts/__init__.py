"""Where prompts come from: files, datasets and the embedded world, in an order that only the seed decides."""
