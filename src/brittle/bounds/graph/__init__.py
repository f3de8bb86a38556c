"""A network as a list of operations with sound rules."""
