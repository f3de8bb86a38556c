"""Our own networks, one family a file; :func:`brittle.build_model` finds them by name and seeds them."""
