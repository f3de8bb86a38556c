"""Files that are whole or absent, exact JSON, and fingerprints of tensors."""
