"""What a training can be made to prefer or to keep: penalties, constraints, proximal steps."""
