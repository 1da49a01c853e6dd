from fulgurite.methods.merging.ties import Ties

CASES = [
    (Ties(), None, False),
    (Ties(density=1.0), None, True),
    (Ties(density=[0.4, 0.0, 1.0], scope="tensor", aggregate="max", vote="frequency"), 3, False),
    (Ties(dialect="mergekit"), None, True),
    (Ties(density=1.0, dialect="peft"), None, True),
]
