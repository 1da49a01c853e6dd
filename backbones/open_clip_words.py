"""Every token of open_clip's towers for text: one vector per caption, and one for each of its words.

Legend: T captions, W words (padding among them), D width shared with pictures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from fulgurite.backbones.library_models import COUNT_FROM_PADDING

ENDS = ("argmax", "eos", "first")  # where a caption's vector is taken from, whatever the padding behind it


class WordTokens(ABC):
    """How one kind of tower gives its tokens. Holds no module, so that none is named twice.

    Attributes:
        longest: ids that the tower can read.
        reads_padding: whether padding changes what it gives for a caption, so that all must have the length that it was
            trained at.
    """

    longest: int
    reads_padding: bool

    @abstractmethod
    def tokens(self, tower: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(T, W) ids to captions (T, D) and words (T, W, D)."""


class ClipWordTokens(WordTokens):
    """open_clip's own transformer: all positions behind its last norm and projection.

    Args:
        tower: a `TextTransformer`, or a `CLIP`, which holds the parts of one.

    Raises:
        ValueError: it takes a caption's vector from a token of its own, or from all.
    """

    def __init__(self, tower: nn.Module) -> None:
        prefix = "" if hasattr(tower, "pool_type") else "text_"
        self.pool_type, self.eos_id = getattr(tower, f"{prefix}pool_type"), getattr(tower, f"{prefix}eos_id", None)
        if getattr(tower, "cls_emb", None) is not None or self.pool_type not in (*ENDS, "last"):
            raise ValueError(
                f"the tower for text pools by {self.pool_type!r}, or by a token of its own (embed_cls of text_cfg): "
                "not supported"
            )
        self.longest = len(tower.positional_embedding)
        self.reads_padding = tower.attn_mask is None or self.pool_type not in ENDS

    def tokens(self, tower: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base; positions and mask are cut to W."""
        from open_clip.transformer import text_global_pool

        length, dtype = ids.shape[1], tower.transformer.get_cast_dtype()
        mask = None if tower.attn_mask is None else tower.attn_mask[:length, :length]
        x = tower.token_embedding(ids).to(dtype) + tower.positional_embedding[:length].to(dtype)
        words = tower.ln_final(tower.transformer(x, attn_mask=mask))
        if isinstance(tower.text_projection, nn.Linear):
            words = tower.text_projection(words)
        elif tower.text_projection is not None:
            words = words @ tower.text_projection
        return text_global_pool(words, ids, self.pool_type, eos_token_id=self.eos_id), words


class HuggingFaceWordTokens(WordTokens):
    """A tower of transformers, which reads no padding: its last hidden states, each projected as their pool is.

    Args:
        tower: open_clip's `HFTextEncoder`.
    """

    reads_padding = False

    def __init__(self, tower: nn.Module) -> None:
        config = tower.config
        self.longest = int(getattr(config, "max_position_embeddings", 0)) or 1 << 20
        if config.model_type in COUNT_FROM_PADDING:
            self.longest -= config.pad_token_id + 1

    def tokens(self, tower: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base."""
        mask = (ids != tower.config.pad_token_id).long()
        out = tower.transformer(input_ids=ids, attention_mask=mask)
        return tower.proj(tower.pooler(out, mask)), tower.proj(out.last_hidden_state)


def word_tokens(tower: nn.Module) -> WordTokens:
    """What fits a tower of open_clip. Raises ValueError where nothing does."""
    return HuggingFaceWordTokens(tower) if hasattr(tower, "pooler") else ClipWordTokens(tower)
