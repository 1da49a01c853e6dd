"""What passes between DataModules and LightningModules: samples, videos, collators, data facts."""

from fulgurite.samples.collator import Batch, Collator, check_fields, check_picklable, sample_fields
from fulgurite.samples.errors import DataError
from fulgurite.samples.fact import LEVELS, Fact, Level
from fulgurite.samples.info import DataInfo, Stage, batches_within, first_stages, stage_of
from fulgurite.samples.picture import Picture, pixels_of
from fulgurite.samples.sample import Sample
from fulgurite.samples.video import Video

__all__ = [
    "LEVELS",
    "Batch",
    "Collator",
    "DataError",
    "DataInfo",
    "Fact",
    "Level",
    "Picture",
    "Sample",
    "Stage",
    "Video",
    "batches_within",
    "check_fields",
    "check_picklable",
    "first_stages",
    "pixels_of",
    "sample_fields",
    "stage_of",
]
