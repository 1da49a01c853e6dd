import pytest
import torch
import torch.nn.functional as F

from fulgurite.methods.generation_losses import IGNORED, KINDS, sample_weights, token_means

COUNTED = torch.tensor([True, True, False, True, True])


def batch(requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 7, generator=generator, requires_grad=requires_grad)
    targets = torch.randint(7, (5, 4), generator=generator)
    for row, length in enumerate((4, 2, 3, 1, 3)):
        targets[row, length:] = IGNORED
    return logits, targets, torch.tensor([1.0, 0.3, 1.0, 0.0, 0.6])


def loss_of(kinds, logits, targets, scores, counted=COUNTED, total=lambda tensor: tensor):
    losses, lengths = token_means(logits, targets)
    return (losses * sample_weights(kinds, scores, lengths, counted, total)).sum()


def test_the_published_losses_written_out():
    logits, targets, scores = batch()
    each = [F.cross_entropy(logits[b], targets[b], ignore_index=IGNORED) for b in range(5)]  # mean over its tokens
    rows = [0, 1, 3, 4]
    expected = {
        "scored": sum(scores[b] * each[b] for b in rows) / 4,
        "samples": sum(each[b] for b in rows) / 4,
        "tokens": F.cross_entropy(logits[rows].flatten(0, 1), targets[rows].flatten(), ignore_index=IGNORED),
    }
    assert set(expected) == set(KINDS)
    for kind, loss in expected.items():
        torch.testing.assert_close(loss_of([kind] * 5, logits, targets, scores), loss)


def test_a_mixed_batch_has_the_mean_over_its_samples_of_each_task_s_own_loss():
    logits, targets, scores = batch()
    kinds = ["tokens", "scored", "tokens", "samples", "tokens"]
    captions = F.cross_entropy(logits[[0, 4]].flatten(0, 1), targets[[0, 4]].flatten(), ignore_index=IGNORED)
    losses, _ = token_means(logits, targets)
    expected = (2 * captions + 0.3 * losses[1] + losses[3]) / 4
    torch.testing.assert_close(loss_of(kinds, logits, targets, scores), expected)


def test_scores_of_0_give_no_loss_and_no_gradient():
    logits, targets, _ = batch(requires_grad=True)
    loss = loss_of(["scored"] * 5, logits, targets, torch.zeros(5))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_add_up_to_the_whole(kind):
    """Two processes of unequal shares, which know each other's sums."""
    logits, targets, scores = batch()
    kinds = [kind] * 5
    shares = [slice(0, 2), slice(2, 5)]
    sums = []
    for share in shares:
        _, lengths = token_means(logits[share], targets[share])
        sample_weights(
            kinds[share], scores[share], lengths, COUNTED[share], lambda tensor: sums.append(tensor) or tensor
        )
    parts = [
        loss_of(kinds[share], logits[share], targets[share], scores[share], COUNTED[share], lambda _: sum(sums))
        for share in shares
    ]
    torch.testing.assert_close(sum(parts), loss_of(kinds, logits, targets, scores))
