from fulgurite.methods.merging.linear import Average, TaskArithmetic

CASES = [
    (Average(), None, True),
    (Average(normalize=False), None, True),
    (TaskArithmetic(lam=1.0), None, True),
    (TaskArithmetic(lam=0.3), None, False),
]
