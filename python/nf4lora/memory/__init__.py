"""Memory of a process beyond its tensors: the C heap, oneDNN's compiled products, the pages of packed weights."""
