from fulgurite.methods.merging.model_stock import ModelStock
from fulgurite.methods.merging.slerp import Slerp

CASES = [
    (Slerp(), 2, False),
    (ModelStock(), 3, False),
    (ModelStock(scope="filter", clamp=False, mean="angle"), 3, False),
]
