from fulgurite.methods.merging.ties import Ties

CASES = [
    (Ties(), None, False),
    (Ties(density=1.0), None, True),
    (Ties(density=1.0, scope="tensor"), None, True),
    (Ties(density=0.3, scope="tensor", aggregate="sum"), None, False),
    (Ties(density=0.5, aggregate="max", vote="frequency"), None, False),
    (Ties(dialect="official"), None, False),
    (Ties(dialect="mergekit"), None, True),
    (Ties(density=0.4, dialect="mergekit"), None, False),
    (Ties(density=1.0, dialect="peft"), None, True),
]
