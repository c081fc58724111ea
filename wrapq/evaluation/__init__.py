"""How good a model is: pure measurements on logits and activations."""
