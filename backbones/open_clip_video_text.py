"""Any dual encoder of open_clip for videos and captions, with the tokens of both towers (UCoFiA, section 3.1).

A frame gives all tokens of its tower's last block, in the width shared with text; the first stands for the frame. A
caption gives one vector and one for each of its words, padding among them. Towers without a class token, and those of
timm, put what they pool first, and then their patches, each through the same head.

Legend: T texts, V videos, W words, F frames, N tokens of a frame, C width of the trunk's tokens, D shared width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fulgurite.backbones.caption_tokens import CaptionTokens, LongCaptions, PadTo, vocabulary_of
from fulgurite.backbones.frame_pixels import StoredPixels
from fulgurite.backbones.frames import FrameTransform
from fulgurite.backbones.open_clip_models import build_dual_encoder
from fulgurite.backbones.open_clip_pictures import PictureTokens, picture_tokens
from fulgurite.backbones.open_clip_points import call_output_layers, never_tuned, video_text_spec
from fulgurite.backbones.open_clip_words import word_tokens
from fulgurite.backbones.video_text import VideoTextBackbone
from fulgurite.backbones.video_text_collator import VideoTextCollator
from fulgurite.checkpoints.digest import digest_of_json, digest_of_state
from fulgurite.methods.retrieval.features import TextTokens, VideoTokens
from fulgurite.methods.retrieval.head import TowerFacts
from fulgurite.methods.retrieval.patch_shift import PatchShift
from fulgurite.samples import Batch, Sample
from fulgurite.samples.features import FeatureExtractor
from fulgurite.samples.sampling import FrameSampling

HEAD_WIDTH = 64  # of CLIP's towers, where the text tower has another width than D
UNUSED = ("logit_scale", "logit_bias")  # of open_clip's model: a head has its own


class TrunkEncoder(nn.Module):
    """The trunk of a tower for pictures, as a feature cache uses it.

    Args:
        name: under which samples hold its tokens.
        tower: open_clip's, in evaluation mode.
        tokens: of that tower.
        transform: frames to pixels.
    """

    def __init__(self, name: str, tower: nn.Module, tokens: PictureTokens, transform: FrameTransform) -> None:
        super().__init__()
        self.name, self.tower, self.tokens, self.transform = name, tower, tokens, transform

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, P, C)."""
        return self.tokens.trunk(self.tower, pixels)

    @property
    def fingerprint(self) -> str:
        """Digest of the trunk's weights, of the grid and of what frames go through before."""
        weights = {name: t for name, t in self.tower.state_dict().items() if self.tokens.in_trunk(name)}
        facts = {"grid": self.tokens.grid, "transform": asdict(self.transform)}
        return digest_of_json({"weights": digest_of_state(weights), **facts})


class OpenClipVideoText(VideoTextBackbone):
    """A dual encoder of open_clip.

    It runs in evaluation mode where ``train_dropout`` is off, also after `unfreeze`. Running statistics of batch norms
    never change: zero frames would spoil them, and a pair's score would depend on its batch.

    Args:
        model: open_clip's name, e.g. ``ViT-B-32-quickgelu``; a folder with ``open_clip_config.json``, or a JSON file;
            or the configuration itself (``embed_dim``, ``vision_cfg``, ``text_cfg``).
        pretrained: weights of the whole model: open_clip's tag, a file, or a folder with one; None leaves random ones.
        vision_weights: file of a whole model of timm for the tower for pictures, or ``package:IMPORT_NAME/inner/path``.
        text: folder, hub name or ``package:NAME/path`` of a model of transformers with its tokenizer, which becomes the
            tower for text. Its weights are loaded unless ``pretrained`` brings them.
        num_frames: F. Shorter videos are filled up by zero frames, which are encoded as any others.
        frame_rule: which frames, see `FrameSampling`.
        frame_rate: frames per second that ``clip4clip`` chooses from.
        max_words: W, the most tokens of a caption, beginning and end among them; up to what the tower reads.
        long_captions: refuse longer ones, or ``cut`` them to ``max_words``, the end among them (published).
        pad_to: captions are padded to ``max_words`` (published), or to the longest of their batch, which changes the
            words alone.
        grid: patches of a frame are averaged to ``grid`` x ``grid`` cells; None keeps all.
        fit: how a frame becomes square; None does as the weights were trained.
        patch_shift: numbers, from 0, of the blocks of the tower for pictures whose attention sees patches of
            neighbouring frames; published are 10 and 11.
        seed: of what no weights fill.
        train_dropout: see `FrozenBackbone`.
        recompute: see `FrozenBackbone`.

    Raises:
        ValueError: options that contradict each other, or a model that has no such tokens.
    """

    def __init__(
        self,
        model: str | dict[str, Any] = "ViT-B-32-quickgelu",
        pretrained: str | None = "openai",
        vision_weights: str | None = None,
        text: str | None = None,
        num_frames: int = 12,
        frame_rule: Literal["uniform", "official_dam", "per_second", "clip4clip"] = "clip4clip",
        frame_rate: int = 1,
        max_words: int = 32,
        long_captions: LongCaptions = "error",
        pad_to: PadTo = "max_words",
        grid: int | None = None,
        fit: Literal["stretch", "crop"] | None = None,
        patch_shift: list[int] | None = None,
        seed: int = 0,
        train_dropout: Literal["official", "off"] = "off",
        recompute: bool = False,
    ) -> None:
        super().__init__(train_dropout, recompute)
        built = build_dual_encoder(model, pretrained, vision_weights, text, seed)
        self.name, self.model, self.width = built.name, built.model, int(built.config["embed_dim"])
        self.source = ", ".join(filter(None, (pretrained, vision_weights, text))) or built.name
        self.sampling, self.transform = FrameSampling(frame_rule, num_frames, frame_rate), built.transform(fit)
        self.picture_tokens = picture_tokens(self.model.visual, grid)
        self.word_tokens = word_tokens(self.text_tower)
        self._check_words(max_words, pad_to)
        self.captions = CaptionTokens(vocabulary_of(built.config["text_cfg"]), max_words, long_captions, pad_to)
        for tower in (self.model.visual, self.text_tower):
            if hasattr(getattr(tower, "transformer", None), "resblocks"):
                call_output_layers(tower.transformer)
        self.shift = PatchShift()
        self.shifted = tuple(sorted(set(patch_shift or [])))
        self._shift(self.shifted)
        self.spec = video_text_spec(self.model, "model.")
        self.never_tuned = never_tuned(self.model, "model.")
        self.freeze()

    @property
    def text_tower(self) -> nn.Module:
        """The module that holds the tower for text; of open_clip's `CLIP` it holds the whole model."""
        return getattr(self.model, "text", self.model)

    def _check_words(self, max_words: int, pad_to: PadTo) -> None:
        longest = self.word_tokens.longest
        if not 3 <= max_words <= longest:
            raise ValueError(f"max_words={max_words}: the tower for text reads 3 to {longest}")
        if self.word_tokens.reads_padding and (max_words, pad_to) != (longest, "max_words"):
            raise ValueError(
                f"the tower for text of {self.name} reads padding, so that captions must have the length that it was "
                f"trained at: set max_words={longest} and pad_to=max_words"
            )

    def _shift(self, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        norms = self.picture_tokens.norms(self.model.visual)
        if outside := [number for number in numbers if not 0 <= number < len(norms)]:
            raise ValueError(f"patch_shift names the blocks {outside}, but there are 0 to {len(norms) - 1}")
        self.shift.attach(norms[number] for number in numbers)

    def train(self, mode: bool = True) -> OpenClipVideoText:
        """As in the base; towers that train are in training mode where dropout is on, but for their batch norms."""
        super().train(mode)
        for tower in self._towers() if mode and self.train_dropout == "official" else ():
            if any(parameter.requires_grad for part in tower for parameter in part.parameters()):
                for part in tower:
                    part.train()
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def _towers(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The modules of each tower."""
        return [self.model.visual], [part for name, part in self.model.named_children() if name != "visual"]

    def unfreeze(self, never: Sequence[str] | None = None) -> None:
        """As in the base; scale and bias of open_clip's own loss, of which a head has its own, never train."""
        super().unfreeze(never)
        for name, parameter in self.model.named_parameters():
            if name in UNUSED:
                parameter.requires_grad_(False)

    @property
    def lengths(self) -> dict[str, int]:
        """As in the base."""
        frames = {"frames": self.sampling.count} if self.sampling.count else {}
        return {**frames, "words": self.captions.max_words}

    def caption_batch(self, captions: Sequence[str], names: Sequence[str] | None = None) -> Batch:
        """As in the base."""
        return self.captions(captions, captions if names is None else names)

    def check_captions(self, samples: Sequence[Sample]) -> None:
        """As in the base; those that are cut are counted where they are read."""
        if self.captions.long_captions == "error":
            names = [sample.id for sample in samples for _ in sample.captions]
            self.captions([caption for sample in samples for caption in sample.captions], names)

    def text_tokens(self, batch: Batch) -> TextTokens:
        """As in the base, of ``text`` (T, W)."""
        sentence, words = self.word_tokens.tokens(self.text_tower, batch["text"])
        return TextTokens(sentence, words, batch["text_mask"])

    def video_tokens(self, batch: Batch) -> VideoTokens:
        """As in the base, of ``pixels`` (V, F, 3, S, S), or of ``tokens`` (V, F, N, C) of the trunk.

        Raises:
            ValueError: stored tokens, where the trunk is not the one that they were computed by.
        """
        tower, mask = self.model.visual, batch["frame_mask"]
        if "tokens" not in batch:
            pixels = batch["pixels"]
            with self.shift.frames(pixels.shape[1]):
                tokens = self.picture_tokens.trunk(tower, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        else:
            if not self.trunk_is_fixed:
                raise ValueError("stored tokens of frames come from a trunk that is not trained, adapted or shifted")
            tokens = batch["tokens"].to(dtype=next(tower.parameters()).dtype)
            if not bool(mask.all()):
                side = self.transform.size
                missing = self.picture_tokens.trunk(tower, tokens.new_zeros(1, 3, side, side))
                tokens = torch.where(mask[..., None, None], tokens, missing)
        # Frames are the samples of every site in this tower, for adapters that are mixed per sample.
        projected = self.picture_tokens.project(tower, tokens.flatten(0, 1))
        return VideoTokens(projected.unflatten(0, mask.shape), mask)

    def tower_facts(self) -> TowerFacts:
        """As in the base. The tower for text is given where it is CLIP's, of width D."""
        tower, blocks = self.text_tower, {}
        heads = max(self.width // HEAD_WIDTH, 1)
        transformer = getattr(tower, "transformer", None)
        if hasattr(transformer, "resblocks") and transformer.width == self.width:
            heads = transformer.resblocks[0].attn.num_heads
            blocks = {f"transformer.{name}": tensor for name, tensor in transformer.state_dict().items()}
            blocks["positional_embedding"] = tower.positional_embedding.detach()
        return TowerFacts(self.width, heads, float(self.model.logit_scale.detach()), blocks)

    @property
    def trunk_is_fixed(self) -> bool:
        """Whether a frame's tokens before the projection depend on the frame alone, now and after training.

        They do not where a parameter of the trunk trains, or something is attached to it: adapters, the shift.
        """
        tower, inside = self.model.visual, self.picture_tokens.in_trunk
        if any(parameter.requires_grad for name, parameter in tower.named_parameters() if inside(name)):
            return False
        hooks = [hook for name, each in tower.named_modules() if inside(name) for hook in each._forward_hooks.values()]
        return all(_home(hook).startswith("torch.") for hook in hooks)  # of torch are those of sharded weights

    def feature_extractor(self) -> FeatureExtractor:
        """Tokens of the trunk, the first of a frame for the whole; frames themselves where those can change, see
        `trunk_is_fixed`."""
        kept = self._encoder() if self.trunk_is_fixed else StoredPixels(self.transform)
        return FeatureExtractor(kept, self.sampling)

    def _encoder(self) -> TrunkEncoder:
        grid = "" if self.picture_tokens.grid is None else f"-{self.picture_tokens.grid}"
        name = f"{self.name}-{self.transform.size}-tokens{grid}"
        return TrunkEncoder(name, self.model.visual, self.picture_tokens, self.transform)

    def collator(self, stage: str) -> VideoTextCollator:
        """The same batches in every stage; only ``predict`` takes videos without captions."""
        stored: Literal["tokens", "pixels"] = "tokens" if self.trunk_is_fixed else "pixels"
        name = self.feature_extractor().encoder.name
        captions = stage != "predict"
        return VideoTextCollator(self.captions, self.sampling, self.transform, name, captions, stored)

    @property
    def fingerprint(self) -> str:
        """Digest of both towers."""
        return digest_of_state(self.state_dict())


def _home(hook: Any) -> str:
    """Name of the Python module that a hook comes from."""
    return getattr(getattr(hook, "func", hook), "__module__", None) or ""
