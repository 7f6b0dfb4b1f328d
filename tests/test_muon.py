"""muon.py: the steps of torch's own Muon, on any subset of the matrices."""

import torch
from runs import FLAGS

import train
from model import GPT
from muon import Muon

SHAPES, FROZEN = [(8, 24), (24, 8), (8, 24), (8, 24), (16, 16)], (0, 4)


def random_matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_its_steps_are_those_of_torchs_and_leave_frozen_matrices_alone():
    starts, options = random_matrices(0), dict(lr=0.01, weight_decay=0.1)
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in starts] for _ in range(2))
    muon = Muon(ours, **options)
    torchs = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)  # its products are bfloat16
    for seed in (1, 2, 3):
        for parameters, optimizer in ((ours, muon), (theirs, torchs)):
            for i, (p, grad) in enumerate(zip(parameters, random_matrices(seed))):
                p.grad = None if i in FROZEN else grad
            optimizer.step()
    for i, (a, b, start) in enumerate(zip(ours, theirs, starts)):
        assert torch.equal(a, start) if i in FROZEN else (a - b).norm() < 0.02 * (a - start).norm()


def test_it_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    cfg = train.configure(train.parse_flags([*FLAGS, "--pos=fire", "--vocab_size=320"]))  # FIRE has matrices too
    model = GPT(cfg)
    names = {id(p): name.split(".", 2)[-1] for name, p in model.named_parameters()}
    adamw, muon = (
        {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in train.make_optimizers(model, cfg)
    )
    assert muon == {"attention.qkv.weight", "attention.out.weight", "mlp.gate_up.weight", "mlp.down.weight"}
    assert adamw == set(names.values()) - muon
