"""How gradients reach the weights: replicas, loss scale, gate, optimizer, `trainable`."""
