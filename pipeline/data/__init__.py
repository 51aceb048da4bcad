"""Load data: orders, augmentation, decoding, and the loaders that make batches of them."""
