"""What a GGUF file is made of: blocks of weights, the facts of an architecture, the tokenizer."""
