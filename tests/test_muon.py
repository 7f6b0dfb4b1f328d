"""muon.py: the steps of torch's own Muon, on any subset of the matrices."""

import copy

import pytest
import torch
from runs import FLAGS

import train
from model import GPT
from muon import Muon

SHAPES, OPTIONS = [(8, 24), (24, 8), (8, 24), (16, 16)], dict(lr=0.01, weight_decay=0.1)


def random_matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def parameters():
    return [torch.nn.Parameter(x) for x in random_matrices(0)]


def step(optimizer, parameters, seed, frozen=()):
    for i, (p, grad) in enumerate(zip(parameters, random_matrices(seed))):
        p.grad = None if i in frozen else grad
    optimizer.step()


@pytest.mark.parametrize("frozen", [(), (0, 3)], ids=["all", "two frozen"])
def test_its_steps_are_those_of_torchs(frozen):
    ours, theirs, starts = parameters(), parameters(), random_matrices(0)
    muon = Muon(ours, **OPTIONS)
    torchs = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **OPTIONS)  # its products are bfloat16
    for seed in (1, 2, 3):
        step(muon, ours, seed, frozen)
        step(torchs, theirs, seed, frozen)
    for i, (a, b, first) in enumerate(zip(ours, theirs, starts)):
        assert torch.equal(a, first) if i in frozen else (a - b).norm() < 0.02 * (a - first).norm()


def test_a_loaded_state_continues_the_run():
    ours = parameters()
    muon = Muon(ours, **OPTIONS)
    step(muon, ours, 1)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    loaded = Muon(copies, **OPTIONS)
    loaded.load_state_dict(copy.deepcopy(muon.state_dict()))
    step(muon, ours, 2)
    step(loaded, copies, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, copies))


@pytest.mark.parametrize("pos", ["fope", "fire"])
def test_it_has_the_matrices_of_the_blocks_and_adamw_the_rest(pos):
    cfg = train.configure(train.parse_flags([*FLAGS, f"--pos={pos}", "--vocab_size=320"]))
    model = GPT(cfg)
    names = {id(p): name.split(".", 2)[-1] for name, p in model.named_parameters()}
    adamw, muon = (
        {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in train.make_optimizers(model, cfg)
    )
    assert muon == {"attention.qkv.weight", "attention.out.weight", "mlp.gate_up.weight", "mlp.down.weight"}
    assert adamw == set(names.values()) - muon
