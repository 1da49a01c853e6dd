from fulgurite.samples import Stage, first_stages


def test_domains_belong_to_the_first_stage_that_trains_them():
    stages = [Stage("all", ("b", "c"), 1, 3), Stage("a", ("a", "b"), 1, 3)]
    assert first_stages(["a", "b", "other", "c"], stages) == [2, 1, None, 1]
    assert first_stages(["a", "b"], stages[:1]) == [None, 1]
    assert first_stages(["a"], []) == [None]
