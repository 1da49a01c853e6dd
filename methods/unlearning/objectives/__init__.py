"""What an edit minimises: the published unlearning objectives, and terms that keep the rest in its place."""

from fulgurite.methods.unlearning.objectives.base import Objective, Terms, View
from fulgurite.methods.unlearning.objectives.ceu import CEU
from fulgurite.methods.unlearning.objectives.dpo import DPO
from fulgurite.methods.unlearning.objectives.empty_response import EmptyResponse
from fulgurite.methods.unlearning.objectives.error_injection import ErrorInjection
from fulgurite.methods.unlearning.objectives.fact_erasure import FactErasure
from fulgurite.methods.unlearning.objectives.gradient_ascent import GradientAscent
from fulgurite.methods.unlearning.objectives.head_projection import HeadProjectionDefence
from fulgurite.methods.unlearning.objectives.input_rephrasing import InputRephrasing
from fulgurite.methods.unlearning.objectives.max_entropy import MaxEntropyDefence
from fulgurite.methods.unlearning.objectives.npo import NPO
from fulgurite.methods.unlearning.objectives.retain import RetainKL, RetainNLL, RetainStates, RetainTerm
from fulgurite.methods.unlearning.objectives.rmu import RMU
from fulgurite.methods.unlearning.objectives.satimp import SatImp
from fulgurite.methods.unlearning.objectives.simnpo import SimNPO
from fulgurite.methods.unlearning.objectives.undial import UNDIAL
from fulgurite.methods.unlearning.objectives.wga import WGA

__all__ = [
    "CEU",
    "DPO",
    "NPO",
    "RMU",
    "UNDIAL",
    "WGA",
    "EmptyResponse",
    "ErrorInjection",
    "FactErasure",
    "GradientAscent",
    "HeadProjectionDefence",
    "InputRephrasing",
    "MaxEntropyDefence",
    "Objective",
    "RetainKL",
    "RetainNLL",
    "RetainStates",
    "RetainTerm",
    "SatImp",
    "SimNPO",
    "Terms",
    "View",
]
