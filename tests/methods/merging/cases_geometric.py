from fulgurite.methods.merging.iso_c import IsoC
from fulgurite.methods.merging.iso_cts import IsoCts
from fulgurite.methods.merging.karcher import Karcher
from fulgurite.methods.merging.layerwise import Layerwise
from fulgurite.methods.merging.linear import TaskArithmetic
from fulgurite.methods.merging.model_stock import ModelStock
from fulgurite.methods.merging.multislerp import MultiSlerp
from fulgurite.methods.merging.nuslerp import NuSlerp
from fulgurite.methods.merging.opcm import Opcm
from fulgurite.methods.merging.slerp import Slerp
from fulgurite.methods.merging.tsv_m import TsvM

CASES = [
    (Slerp(), 2, False),
    (Layerwise(TaskArithmetic(1.0), [("attn", [0, 1, 0]), ("block", [[0.2, 0.5], 1, 2.0])]), 3, False),
    (Layerwise(Slerp(), [("attn", [0, 1])]), 2, False),
    (ModelStock(), 3, False),
    (ModelStock(scope="filter", clamp=False, mean="angle"), 3, False),
    (IsoC(), None, False),
    (IsoC(lam=0.5, exclude=["head"], solver="newton_schulz"), None, False),
    (TsvM(), None, False),
    (TsvM(whiten="svd"), 3, False),
    (Opcm(), None, True),
    (Opcm(keep=True, exclude=["head"]), None, True),
    (NuSlerp(), 2, False),
    (NuSlerp(flatten=False, task_vectors=True), 2, False),
    (NuSlerp(flatten=False, dim=0), 2, False),
    (MultiSlerp(), None, True),
    (MultiSlerp(task_vectors=True), None, True),
    (Karcher(), None, True),
    (IsoCts(), None, False),
    (IsoCts(common=0.4, solver="svd"), 3, False),
]
