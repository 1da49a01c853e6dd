"""Optimizers of published code that torch does not have."""

from fulgurite.methods.optimizers.bert_adam import BertAdam

__all__ = ["BertAdam"]
