"""What can be wrong with a data set, before it is converted or after."""
