"""Writing a converted data set: aside first, then whole to its place; LUPerson shard by shard."""
