"""model.py: the paper's counts, the forward pass against transformers and float64 formulas, decoding, checkpoints."""

import math

import pytest
import torch
from conftest import llama_of, make_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from baselines import whole_cycles
from fope import FoPE, rope_frequencies
from hf.convert import in_llama_names
from model import GPT, POSITIONS, PRESETS, GPTConfig, load_model


def config(pos="fope", **changes):
    """Small, N = 16; theta 10 and head_dim 16, so that FoPE keeps four pairs of eight."""
    shape = dict(n_layer=2, n_head=2, n_embd=32, n_hidden=40, vocab_size=50, train_len=16, theta=10.0)
    return GPTConfig(pos=pos, **{**shape, "coef_init": "normal", **changes})


def loud(pos="fope", **changes):
    """A model whose attention has favourites: with a std of 0.02, right and wrong attention look alike."""
    model = GPT(config(pos, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("position.L"):
                weight.fill_(0.01)  # FIRE: the query's position counts from 5 on, not from 512
            elif ".position." in name:
                weight.mul_(3)
            elif weight.dim() == 2:
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
    return model.eval()


def some_tokens(B, T, vocab_size=50, seed=0):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def near(got, want, atol=2e-5):
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Parameters and checkpoints


def test_presets_are_the_papers():
    """Parameters with one embedding matrix, heads and their size, sigma."""
    paper = {"60M": (59_318_784, 8, 64, 0.3), "180M": (185_746_432, 8, 128, 0.4), "1.2B": (1_176_832_000, 16, 128, 0.6)}
    for preset, shape in paper.items():
        cfg = GPTConfig(**PRESETS[preset])
        with torch.device("meta"):  # shapes without memory
            assert (GPT(cfg).n_params(), cfg.n_head, cfg.d, cfg.sigma) == shape


def test_every_version_of_torch_draws_the_weights_of_2_13():
    """Normal, cut at three of init_std. A version that draws others from a seed makes the committed seeds worthless."""
    model = GPT(config(vocab_size=100, n_embd=100, n_hidden=200, init_std=0.5, seed=7))
    drawn, matrices = model.embedding.weight / 0.5, [weight for weight in model.parameters() if weight.dim() == 2]
    assert drawn[0, :3].tolist() == pytest.approx([-0.820135, 0.395631, 0.898908], abs=1e-6)
    assert drawn.sum().item() == pytest.approx(198.976, abs=1e-2) and drawn.abs().max() <= 3
    assert [x.std().item() for x in matrices] == pytest.approx([0.5 * 0.987] * len(matrices), rel=0.03)


def test_a_seed_gives_all_embeddings_the_same_weights():
    weights = {}
    for pos in POSITIONS:
        torch.manual_seed(len(weights))  # the global generator has no say
        weights[pos] = dict(GPT(config(pos, seed=3)).named_parameters())
    for name, weight in weights["nope"].items():
        assert all(torch.equal(weight, weights[pos][name]) for pos in POSITIONS), name


def test_every_option_reaches_the_embedding():
    options = dict(theta=100.0, train_len=32, sigma=0.7, coef_init="xavier", n_freqs=9, zero_phase=False)
    position = GPT(config("fope", **options)).blocks[0].attention.position
    want = FoPE(n_head=2, head_dim=16, seed=1, **options)
    t = torch.arange(40)
    near(position.cos_sin(t), want.cos_sin(t))
    position = GPT(config("rope", whole_cycles=True, scaling="linear", scale=4.0)).blocks[0].attention.position
    near(position.omega, whole_cycles(rope_frequencies(16, 10.0), 16) / 4)


def test_every_layer_of_every_seed_has_its_own_coefficients():
    draws = [block.attention.position.coef for seed in range(3) for block in GPT(config(seed=seed)).blocks]
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_a_checkpoint_gives_its_model_back_and_fits_no_model_of_another_shape(tmp_path):
    model, tokens = loud(), some_tokens(2, 40)
    for block in model.blocks:
        block.attention.position.coef.mul_(2)  # not the seed's
    make_run(tmp_path, model, step=7)
    loaded, checkpoint = load_model(tmp_path)
    assert checkpoint["step"] == 7 and loaded.cfg == model.cfg and not loaded.training
    assert torch.equal(loaded(tokens), model(tokens))
    model.cfg.train_len = 8  # fewer pairs are kept, as after a student's change of fope.py: torch's error is shown
    make_run(tmp_path, model)
    with pytest.raises(RuntimeError, match="size mismatch for blocks.0.attention.position.coef"):
        load_model(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# The forward pass


@pytest.mark.parametrize("pos, qk_norm, logn", [*((pos, False, 1.5) for pos in POSITIONS), ("rope", True, 0.0)])
def test_attention_is_the_formula(pos, qk_norm, logn):
    """Written out for each head in float64. Rotations and learned biases have their formulas in the other tests."""
    attention = loud(pos, qk_norm=qk_norm, logit_scale=0.8).blocks[0].attention
    T, H, d = 300, 2, 16  # learned biases take 256 queries at a time
    x = torch.randn(T, H * d, generator=torch.Generator().manual_seed(0))
    i, j = torch.arange(T)[:, None], torch.arange(T)

    q, k, v = (x.double() @ attention.qkv.weight.double().T).view(T, 3, H, d).permute(1, 2, 0, 3)  # (H, T, d) each
    if qk_norm:
        q, k = ((z - z.mean(-1, True)) / (z.var(-1, False, True) + 1e-5).sqrt() for z in (q, k))
    n = torch.arange(1, T + 1)[:, None]  # visible keys. Log n multiplies queries, and so no bias
    q = 0.8 * q * (n.log() / math.log(16)).clamp(min=1) ** logn
    if pos in ("fope", "rope"):
        q, k = (z[0] for z in attention.position(q[None], k[None]))
    logits = q @ k.mT / math.sqrt(d)
    if pos == "alibi":
        logits -= torch.tensor([2.0**-4, 2.0**-8]).view(H, 1, 1) * (i - j)
    if hasattr(attention.position, "bias"):
        logits = logits + attention.position.bias(i, j)
    y = logits.masked_fill(j > i, -math.inf).softmax(-1) @ v
    near(attention(x[None], n.T[0] - 1, logn)[0], y.transpose(0, 1).flatten(1) @ attention.out.weight.double().T)


@pytest.mark.parametrize("n_head, n_kv_head, head_dim, tied, eps", [(3, 0, 0, False, 1e-6), (6, 2, 24, True, 1e-2)])
def test_rope_model_is_llama(n_head, n_kv_head, head_dim, tied, eps):
    """transformers' Llama with our weights has our logits, loss and gradients: every part at once, by other hands."""
    torch.manual_seed(0)
    heads = dict(n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim)
    shape = dict(n_layer=3, n_embd=48, n_hidden=80, vocab_size=100, tied=tied, norm_eps=eps)
    ours = GPT(GPTConfig(pos="rope", init_std=0.1, **heads, **shape))
    ours.recompute = tied  # which changes nothing
    for module in ours.modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    llama = llama_of(ours)
    tokens, targets = torch.randint(100, (2, 300)), torch.randint(100, (2, 300))
    theirs = llama(tokens, labels=targets, shift_labels=targets)
    near(ours(tokens), theirs.logits, atol=1e-4)
    near(ours(tokens, last=3), theirs.logits[:, -3:], atol=1e-4)
    loss = ours(tokens, targets)
    assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    with torch.no_grad():  # evaluation takes 256 of the 600 positions at a time
        assert ours(tokens, targets).item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    assert ours.n_params() == sum(p.numel() for p in llama.parameters()) - (not tied) * 100 * 48
    loss.backward()
    theirs.loss.backward()
    for name, gradient in in_llama_names(ours.cfg, {n: p.grad for n, p in ours.named_parameters()}).items():
        torch.testing.assert_close(gradient, llama.get_parameter(name).grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("pos", ["fope", "alibi"])
def test_training_keeps_no_tensor_that_grows_with_the_square_of_the_length(pos):
    model, tokens, sizes = loud(pos, n_layer=1), torch.zeros(1, 4096, dtype=torch.long), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        model(tokens, tokens)
    assert 4096 * 32 <= max(sizes) < 4096 * 4096 / 16


class Itself(nn.Module):
    """A student's embedding, with all that attention asks of one: each token sees itself alone."""

    heads = 2

    def forward(self, q, k, positions):
        return q, k

    def bias(self, i, j):
        return torch.where(i == j, 0.0, -1e9).expand(self.heads, -1, -1)


def test_attention_knows_a_position_embedding_by_its_methods_alone():
    model, tokens = loud("nope"), some_tokens(2, 300)
    for block in model.blocks:
        block.attention.position = Itself()
    near(model(tokens, last=1), model(tokens[:, -1:]))
    model.constrain()  # it has nothing to bring into bounds
    model.blocks[0].attention.position.heads = 1  # a bug that torch would broadcast
    with pytest.raises(ValueError, match=r"bias.*not \(\.\., 2, 256, 256\)"):
        model(tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize("pos, logn", [*((pos, 0.0) for pos in POSITIONS), ("fope", 1.5)])
@settings(max_examples=6)
@given(
    chunks=st.lists(st.sampled_from([1, 2, 7, 42, 300]), min_size=2, max_size=4),  # biases take 256 queries at a time
    pads=st.just(0) | st.integers(1, 60),
    n_kv_head=st.sampled_from([1, 2]),
)
def test_chunks_through_a_cache_give_each_row_what_it_has_alone(pos, logn, chunks, pads, n_kv_head):
    model, tokens = loud(pos, n_kv_head=n_kv_head, logn=logn), some_tokens(2, sum(chunks))
    pads, cache = min(pads, chunks[0] - 1), model.new_cache()
    with torch.no_grad():
        options = dict(cache=cache) | (dict(pads=torch.tensor([0, pads])) if pads else {})
        logits = torch.cat([model(chunk, **options) for chunk in tokens.split(chunks, dim=1)], dim=1)
    model.recompute = True  # which is on in training alone, and changes nothing
    near(logits[:1], model(tokens[:1]))
    near(logits[1:, pads:], model(tokens[1:, pads:]))
    assert [values.shape for keys, values in cache] == [(2, n_kv_head, sum(chunks), 16)] * 2


def test_greedy_takes_the_most_likely_token_each_time_whatever_the_left_padding():
    model, tokens, pads = loud(logn=1.5), some_tokens(3, 30), torch.tensor([0, 5, 29])
    got = model.generate(tokens, 20, pads=pads)
    for b, n in enumerate(pads):
        alone = model(got[b : b + 1, n:])  # without padding or a cache
        assert torch.equal(got[b, 30:], alone[0, 29 - n : -1].argmax(-1))
    assert torch.equal(got, model.generate(tokens, 20, pads=pads, temperature=1e-40))


def test_sampling_follows_the_softmax_of_the_most_likely_tokens():
    model, prompt, draws = loud(), some_tokens(1, 5), 6_000
    logits = model(prompt)[0, -1].double() / 2.0
    share = logits.masked_fill(logits < logits.sort().values[-7], -math.inf).softmax(-1)
    got = model.generate(prompt.expand(draws, -1), 1, temperature=2.0, top_k=7)[:, -1].bincount(minlength=50) / draws
    assert ((got - share).abs() < 5 * (share / draws).sqrt() + 1e-9).all()
    with pytest.raises(ValueError, match="must be 0 or more"):  # it would prefer unlikely tokens
        model.generate(prompt, 1, temperature=-1.0)
