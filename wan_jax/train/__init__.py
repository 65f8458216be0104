"""Training: one step, one loop, and what they are applied to (flow matching, codecs), on clips or on puppets."""
