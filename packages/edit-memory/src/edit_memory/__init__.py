"""Keys and values kept beside a projection: the gate of NeuralDB and the codebook of GRACE."""
