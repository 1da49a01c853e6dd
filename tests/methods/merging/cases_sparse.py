from fulgurite.methods.merging.arcee_fusion import ArceeFusion
from fulgurite.methods.merging.breadcrumbs import Breadcrumbs
from fulgurite.methods.merging.dare import Dare
from fulgurite.methods.merging.della import Della
from fulgurite.methods.merging.magmax import MagMax
from fulgurite.methods.merging.nearswap import NearSwap
from fulgurite.methods.merging.pcb import Pcb
from fulgurite.methods.merging.ram import Ram
from fulgurite.methods.merging.sce import Sce

CASES = [
    (Dare(0.0), None, True),
    (Dare([0.5, 0.2, 0.9], then="ties"), 3, False),
    (Dare(0.6, dialect="mergekit", then="average"), None, False),
    (MagMax(), None, False),
    (MagMax(lam=1.0), None, True),
    (Della(density=1.0, lam=1.0), None, True),
    (Della(), None, False),
    (Breadcrumbs(density=1.0, lam=1.0), None, True),
    (Breadcrumbs(density=0.5, gamma=[0.1, 0.0, 0.3], then="ties"), 3, False),
    (Breadcrumbs(density=0.5, gamma=0.2, dialect="official"), None, False),
    (Pcb(ratio=0.3), None, False),
    (Pcb(normalised=False, lam=[1.0, 0.5, 2.0]), 3, False),
    (Sce(), None, True),
    (Sce(topk=0.4, floor=0.0), 3, False),
    (NearSwap(0.05), 1, False),
    (ArceeFusion(), 1, False),
    (Ram(epsilon=0.0), None, True),
    (Ram(epsilon=0.05, plus=True), None, False),
]
