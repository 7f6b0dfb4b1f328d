"""model.py: the paper's counts, the forward pass against transformers and float64 formulas, decoding, checkpoints."""

import math

import pytest
import torch
from conftest import llama_of, make_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from baselines import whole_cycles
from fope import FoPE, rope_frequencies
from hf.convert import in_llama_names
from model import GPT, POSITIONS, PRESETS, GPTConfig, draw_weights, load_model


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
# Parameters


@pytest.mark.parametrize(
    "preset, one_embedding, everything, shape",
    [
        ("60M", 59_318_784, 85_074_432, (8, 64, 0.3, 0.02)),
        ("180M", 185_746_432, 237_257_728, (8, 128, 0.4, 0.02)),
        ("1.2B", 1_176_832_000, 1_279_854_592, (16, 128, 0.6, 0.02)),
    ],
)
def test_presets_are_the_papers(preset, one_embedding, everything, shape):
    cfg = GPTConfig(**PRESETS[preset])
    with torch.device("meta"):  # shapes without memory
        model = GPT(cfg)
    assert model.n_params() == one_embedding
    assert sum(p.numel() for p in model.parameters()) == everything
    assert (cfg.n_head, cfg.d, cfg.sigma, cfg.init_std) == shape


def test_matrices_start_from_a_normal_cut_at_three_standard_deviations():
    std, cut = 0.06, math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))
    for name, weight in GPT(GPTConfig(vocab_size=500, init_std=std)).named_parameters():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            assert weight.std().item() == pytest.approx(std * cut, rel=0.03), name
            assert 2.75 * std < weight.abs().max() <= 3.0001 * std, name


def test_a_seed_gives_all_embeddings_the_same_weights():
    weights = {}
    for pos in POSITIONS:
        torch.manual_seed(len(weights))  # the global generator has no say
        weights[pos] = dict(GPT(config(pos, seed=3)).named_parameters())
    for name, weight in weights["nope"].items():
        assert all(torch.equal(weight, weights[pos][name]) for pos in POSITIONS), name
    other = GPT(config("nope", seed=4)).embedding.weight
    assert torch.isclose(other, weights["nope"]["embedding.weight"]).float().mean() < 0.01


def test_every_version_of_torch_draws_the_weights_of_2_13():
    """A version that draws others from a seed makes the committed seeds worthless."""
    drawn = torch.empty(100, 100)
    draw_weights(drawn, 1.0, torch.Generator().manual_seed(7))
    assert drawn[0, :3].tolist() == pytest.approx([-0.820135, 0.395631, 0.898908], abs=1e-6)
    assert drawn.sum().item() == pytest.approx(198.976, abs=1e-2)


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


# ----------------------------------------------------------------------------------------------------------------------
# The forward pass


@pytest.mark.parametrize("pos, qk_norm", [*((pos, False) for pos in POSITIONS), ("rope", True)])
def test_attention_is_the_formula(pos, qk_norm):
    """Written out for each head in float64. Rotations and learned biases have their formulas in the other tests."""
    attention = loud(pos, qk_norm=qk_norm).blocks[0].attention
    T, H, d = 300, 2, 16  # learned biases take 256 queries at a time
    x = torch.randn(T, H * d, generator=torch.Generator().manual_seed(0))
    i, j = torch.arange(T)[:, None], torch.arange(T)

    q, k, v = (x.double() @ attention.qkv.weight.double().T).view(T, 3, H, d).permute(1, 2, 0, 3)  # (H, T, d) each
    if qk_norm:
        q, k = ((z - z.mean(-1, True)) / (z.var(-1, False, True) + 1e-5).sqrt() for z in (q, k))
    if pos in ("fope", "rope"):
        q, k = (z[0] for z in attention.position(q[None], k[None]))
    logits = q @ k.mT / math.sqrt(d)
    if pos == "alibi":
        logits -= torch.tensor([2.0**-4, 2.0**-8]).view(H, 1, 1) * (i - j)
    if hasattr(attention.position, "bias"):
        logits = logits + attention.position.bias(i, j)
    y = logits.masked_fill(j > i, -math.inf).softmax(-1) @ v
    near(attention(x[None])[0], y.transpose(0, 1).flatten(1) @ attention.out.weight.double().T)


@pytest.mark.parametrize("n_head, n_kv_head, tied, eps", [(3, 0, False, 1e-6), (6, 2, True, 1e-2)])
def test_rope_model_is_llama(n_head, n_kv_head, tied, eps):
    """transformers' Llama with our weights has our logits, loss and gradients: every part at once, by other hands."""
    torch.manual_seed(0)
    shape = dict(n_layer=3, n_head=n_head, n_kv_head=n_kv_head, n_embd=48, n_hidden=80, tied=tied, norm_eps=eps)
    ours = GPT(GPTConfig(pos="rope", vocab_size=100, init_std=0.1, **shape))
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
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


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("pos", ["fope", "alibi"])
def test_training_builds_no_tensor_that_grows_with_the_square_of_the_length(pos):
    model, tokens = loud(pos, n_layer=1), torch.zeros(1, 4096, dtype=torch.long)
    with Largest() as largest:
        model(tokens, tokens).backward()
    assert 4096 * 32 <= largest.numel < 4096 * 4096 / 16


@pytest.mark.parametrize("pos", POSITIONS)
def test_log_n_multiplies_each_query_beyond_n_and_no_bias(pos):
    """In one layer, the logits at a position depend on the query there alone. So its factor can be put on W_q."""
    model, plain, tokens = loud(pos, n_layer=1, logn=1.5), loud(pos, n_layer=1, logit_scale=0.8), some_tokens(2, 40)
    weight = plain.blocks[0].attention.qkv.weight[:32]
    for n in (1, 10, 16, 17, 40):
        factor = max(math.log(n) / math.log(16), 1.0) ** 1.5
        with torch.no_grad():
            weight.mul_(factor / 0.8)
            near(model(tokens)[:, n - 1], plain(tokens)[:, n - 1])
            weight.div_(factor / 0.8)


@pytest.mark.parametrize("head_dim", [8, 24])
def test_the_size_of_a_head_is_free(head_dim):
    rope = GPT(GPTConfig(pos="rope", n_layer=2, n_head=2, n_embd=32, head_dim=head_dim, vocab_size=50, init_std=0.1))
    near(rope(some_tokens(1, 30)), llama_of(rope)(some_tokens(1, 30)).logits, atol=1e-4)


@pytest.mark.parametrize("pads", [None, torch.tensor([0, 5])], ids=["whole", "left-padded"])
def test_recompute_changes_neither_logits_nor_gradients_nor_decoding(pads):
    tokens, results = some_tokens(2, 30), []
    for recompute in (False, True):
        model = loud()
        model.recompute = recompute
        logits, cache = model(tokens, pads=pads), model.new_cache()
        logits.square().sum().backward()
        chunks = [model(chunk, cache=cache, pads=pads) for chunk in tokens.split([20, 10], dim=1)]
        results.append([logits, torch.cat(chunks, 1), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=0, atol=0)


class Distance(nn.Module):
    """A stranger's embedding: all that attention asks of it."""

    def forward(self, q, k, positions):
        return q, k

    def bias(self, i, j):
        return -0.1 * (i - j).expand(2, -1, -1)


def test_attention_knows_a_position_embedding_by_its_methods_alone():
    ours, theirs = loud("nope"), loud("alibi")
    for block, other in zip(ours.blocks, theirs.blocks):
        block.attention.position = Distance()
        other.attention.position.slopes = torch.full((2,), 0.1) * 16**0.5
    near(ours(some_tokens(2, 300)), theirs(some_tokens(2, 300)))
    ours.constrain()  # it has nothing to bring into bounds


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


VARIANTS = pytest.mark.parametrize("pos, logn", [*((pos, 0.0) for pos in POSITIONS), ("fope", 1.5)])


@VARIANTS
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
        near(logits[:1], model(tokens[:1]))
        near(logits[1:, pads:], model(tokens[1:, pads:]))
    width = 24 if pos == "alibi" else 16
    assert [layer[0].shape for layer in cache] == [(2, n_kv_head, sum(chunks), width)] * 2


def test_a_decoding_step_compiles_whole():
    torch._dynamo.reset()
    model, tokens = loud(n_kv_head=1), some_tokens(1, 30)
    compiled, cache = torch.compile(model, backend="eager", fullgraph=True), model.new_cache()
    with torch.no_grad():
        steps = [compiled(chunk, cache=cache) for chunk in tokens.split([20] + [1] * 10, dim=1)]
        near(torch.cat(steps, dim=1), model(tokens))


@VARIANTS
def test_greedy_takes_the_most_likely_token_each_time_whatever_the_left_padding(pos, logn):
    model, tokens, pads = loud(pos, n_kv_head=1, logn=logn), some_tokens(3, 30), torch.tensor([0, 5, 29])
    got = model.generate(tokens, 20, pads=pads)
    assert torch.equal(got[:, :30], tokens)
    for b, n in enumerate(pads):
        alone = model(got[b : b + 1, n:])  # without padding or a cache
        assert torch.equal(got[b, 30:], alone[0, 29 - n : -1].argmax(-1))


def test_a_row_that_has_ended_is_filled_up():
    model, prompt = loud(), some_tokens(2, 5)
    want = model.generate(prompt, 30)[:, 5:]
    eot = want[0, 3].item()
    ends = [row.tolist().index(eot) if eot in row else 30 for row in want]
    got = model.generate(prompt, 30, eot=eot)[:, 5:]
    assert got.shape[1] == min(max(ends) + 1, 30)
    for row, whole, end in zip(got, want, ends):
        assert row.tolist() == (whole[: end + 1].tolist() + [eot] * 30)[: got.shape[1]]


@pytest.mark.parametrize("temperature, top_k", [(2.0, 0), (1.0, 7)])
def test_sampling_follows_the_softmax(temperature, top_k):
    model, prompt, draws = loud(), some_tokens(1, 5), 6_000
    logits = model(prompt)[0, -1].double() / temperature
    if top_k:
        logits[logits < logits.sort().values[-top_k]] = -math.inf
    share = logits.softmax(-1)
    options = dict(temperature=temperature, top_k=top_k)
    got = model.generate(prompt.expand(draws, -1), 1, **options)[:, -1].bincount(minlength=50) / draws
    assert ((got - share).abs() < 5 * (share / draws).sqrt() + 1e-9).all()


def test_sampling_repeats_under_one_seed_and_a_tiny_temperature_is_greedy():
    def generate(**options):
        return loud().generate(some_tokens(2, 5), 10, **options)

    one, again, other = (generate(temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(generate(temperature=1e-40), generate())
    for bad in (dict(temperature=math.nan), dict(temperature=-1.0), dict(top_k=-1)):
        with pytest.raises(ValueError, match="must be 0 or more"):
            generate(**bad)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_gives_its_model_back(tmp_path):
    model, tokens = loud(), some_tokens(2, 40)
    for block in model.blocks:
        block.attention.position.coef.mul_(2)  # not the seed's
    make_run(tmp_path, model, step=7)
    for where in (str(tmp_path / "ckpt.pt"), tmp_path):  # the file, or its folder
        loaded, checkpoint = load_model(where)
        assert checkpoint["step"] == 7 and loaded.cfg == model.cfg and not loaded.training
        assert torch.equal(loaded(tokens), model(tokens))
