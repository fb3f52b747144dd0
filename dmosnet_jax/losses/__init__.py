"""Loss functions: pure, float32 inside, over the global batch, so the result does not depend on the device count."""
