"""A page to try a network with: two photos and how alike they are, one photo and whom it resembles in a gallery."""
