"""Facts deleted from a model: what an edit minimises, how it is made, who attacks it, and what is measured."""
