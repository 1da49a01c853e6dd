"""A small model with every sort of parameter that a sparse mask meets, and a bank of masks on it."""

import copy
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.sparse_mask import SparseMask
from fulgurite.methods.structure import ModelSpec

D, WORDS = 8, 11


class Block(nn.Module):
    """Attention that reads its output projection without calling it, and a convolution in channels-last form."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.conv = nn.Conv2d(D, D, (1, 3), padding=(0, 1)).to(memory_format=torch.channels_last)

    def forward(self, x):
        x = x + self.attention(x, x, x)[0]
        x = x + self.conv(x.mT[:, :, None])[:, :, 0].mT
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    """Words (B, T) to (B, T, WORDS): the head is tied to the embedding, the root owns a parameter itself."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(D))
        self.embedding = nn.Embedding(WORDS, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.running = nn.BatchNorm1d(D)
        self.head = nn.Linear(D, WORDS)
        self.head.weight = self.embedding.weight
        self.recompute = None
        owners = r"|embedding|blocks\.\d\.(attention|norm|up|down|conv)|running|head"
        self.spec = ModelSpec(towers=(), points={"parameters": (owners, 14), "norms": (r"blocks\.\d\.norm", 2)})

    def forward(self, words):
        x = self.embedding(words) + self.offset
        for block in self.blocks:
            x = block(x) if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
        return self.head(self.running(x.mT).mT)


def build(density=0.3, sets=(), seed=0, **options):
    """A frozen net, and a bank of random masks on it."""
    options = {"score": "random", **options}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = Net()
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.4)
    net.requires_grad_(False).eval()
    return net, AdapterBank(net, [Placement(["parameters"], partial(SparseMask, density=density, **options))], sets)


def mask_of(bank, name="live"):
    return bank.adapters_of(name)["placement-0"]


def words(batch=4, seed=1):
    return torch.randint(0, WORDS, (batch, 5), generator=torch.Generator().manual_seed(seed))


def loss_of(net, batch):
    return nn.functional.cross_entropy(net(batch).flatten(0, 1), batch.roll(1, 1).flatten())


def dense_copy(net):
    """The bare net, free of the bank's hooks, to be trained as a whole."""
    plain = Net().eval()
    plain.load_state_dict(net.state_dict())
    for block in plain.blocks:
        block.conv.to(memory_format=torch.channels_last)
    return plain


def flat(net):
    """All parameters, in the order in which positions count."""
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def state_of(net):
    return copy.deepcopy(net.state_dict())


def is_at(net, state):
    """Whether the net's own parameters and buffers are these to the bit."""
    now = net.state_dict()
    kinds = all(
        isinstance(module._parameters[name], nn.Parameter | None)
        for module in net.modules()
        for name in module._parameters
    )
    return kinds and all(torch.equal(now[name], value) for name, value in state.items())
