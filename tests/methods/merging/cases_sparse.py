from fulgurite.methods.merging.dare import Dare
from fulgurite.methods.merging.magmax import MagMax

CASES = [
    (Dare(0.0), None, True),
    (Dare([0.5, 0.2, 0.9], then="ties"), 3, False),
    (Dare(0.6, dialect="mergekit", then="average"), None, False),
    (MagMax(), None, False),
    (MagMax(lam=1.0), None, True),
]
