"""One TensorFlow Datasets builder for each data set; importing a builder's module registers it for `tfds.load`."""
