"""What a process holds beyond its tensors, kept small: the C heap, oneDNN's compiled products, pages of weights."""
