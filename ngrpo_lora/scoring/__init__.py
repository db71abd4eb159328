"""Images in, one number for each image and reward out, added up over several rewards."""
