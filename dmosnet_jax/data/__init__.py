"""Records, splits, samplers, the host pipeline and the augmentation on the device.

Worker processes import this package, so it imports nothing itself: whoever needs jax imports `augment` by name.
"""
