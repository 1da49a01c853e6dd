"""The default videos: five small worlds, their questions, and the generator that made them."""
