"""model.py: counts, initialisation, the forward pass against plain float64 formulas, decoding, checkpoints, the command."""

import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fope import POSITIONS
from llama import in_llama_names, llama_of
from model import GPT, PRESETS, GPTConfig, find_device, load_checkpoint, load_model

ROOT = Path(__file__).resolve().parent.parent


def config(pos="fope", **changes):
    """Small, N = 16; theta 10 and head_dim 16, so that FoPE keeps four pairs of eight."""
    shape = dict(n_layer=2, n_head=2, n_embd=32, n_hidden=40, vocab_size=50, train_len=16, theta=10.0, coef_init="normal")
    return GPTConfig(pos=pos, **{**shape, **changes})


def loud(pos="fope", **changes):
    """A model whose attention looks somewhere: with a std of 0.02 every position weighs about the same, right or wrong."""
    model = GPT(config(pos, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".position." in name:
                weight.mul_(3)
                continue
            weight.normal_(generator=generator)
            if weight.dim() == 1:
                weight.mul_(0.2).add_(1)
            else:
                weight.mul_(0.01 if name == "embedding.weight" else weight.shape[1] ** -0.5)  # 0.01: so small that eps counts
    return model.eval()


def some_tokens(B, T, vocab_size=50, seed=0):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


COUNTS = [("60M", 59_318_784, 85_074_432), ("180M", 185_746_432, 237_257_728), ("1.2B", 1_176_832_000, 1_279_854_592)]


@pytest.mark.parametrize("preset, one_embedding, everything", COUNTS)
def test_parameters_of_the_paper(preset, one_embedding, everything):
    with torch.device("meta"):  # shapes without memory
        model = GPT(GPTConfig(pos="nope", **PRESETS[preset]))
    assert model.n_params() == one_embedding
    assert sum(p.numel() for p in model.parameters()) == everything


def test_every_position_embedding_has_the_same_parameters():
    """FoPE's coefficients are none. With the test above: the paper's counts hold for all of them, but for the learned biases' few."""
    named = {pos: {name: p.shape for name, p in GPT(config(pos)).named_parameters()} for pos in POSITIONS}
    for pos, shapes in named.items():
        learned = [name for name in shapes if name not in named["nope"]]
        assert all(shapes[name] == shape for name, shape in named["nope"].items())
        assert len(learned) == {"kerple": 2 * 2, "fire": 2 * 6}.get(pos, 0), pos  # two layers


def test_what_the_counts_do_not_show():
    """Heads, their width, sigma and the start's std of the paper's three."""
    got = {n: (c.n_head, c.head_dim, c.sigma, c.init_std) for n, c in ((n, GPTConfig(**PRESETS[n])) for n, *_ in COUNTS)}
    assert got == {"60M": (8, 64, 0.3, 0.02), "180M": (8, 128, 0.4, 0.02), "1.2B": (16, 128, 0.6, 0.02)}


@pytest.mark.parametrize("changes, std", [({}, 0.02), (dict(init_std=0.06), 0.06)], ids=str)
def test_initialisation(changes, std):
    """A normal cut at three standard deviations has 0.9866 of its std."""
    cut = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))
    assert cut == pytest.approx(0.9866, abs=1e-4)
    for name, weight in GPT(GPTConfig(vocab_size=500, **changes)).named_parameters():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            assert weight.std().item() == pytest.approx(std * cut, rel=0.03), name
            assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel()), name
            assert 2.75 * std < weight.abs().max() <= 3.0001 * std, name


def test_one_seed_one_start_for_every_position_embedding():
    weights = {}
    for pos in POSITIONS:
        torch.manual_seed(len(weights))  # the global generator has no say
        weights[pos] = dict(GPT(config(pos, seed=3)).named_parameters())
    for name, weight in weights["rope"].items():
        assert all(torch.equal(weight, weights[pos][name]) for pos in POSITIONS), name
    for name, other in GPT(config("rope", seed=4)).named_parameters():
        assert other.dim() == 1 or not torch.isclose(other, weights["rope"][name]).float().mean() > 0.01, name


def test_coefficients_differ_between_layers_and_seeds():
    draws = [block.attention.position.coef for seed in range(3) for block in GPT(config(seed=seed)).blocks]
    assert len(draws) == 6
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(pos="yarn"), "yarn.*fope, rope, alibi, kerple, fire, nope"),
        (dict(n_head=3), "3.*32"),
        (dict(pos="rope", n_embd=30), "15 is odd"),
        (dict(pos="fope", n_embd=30), "15 is odd"),
        (dict(n_freqs=3), "n_freqs 3"),
        (dict(coef_init="uniform"), "uniform"),
        (dict(train_len=6), "train_len 6"),
        (dict(scaling="ntk"), "ntk.*none, linear or yarn"),
        (dict(scaling="linear", scale=0.0), "scale 0"),
        (dict(scaling="yarn", original_len=0), "original_len 0"),
        (dict(scaling="yarn", whole_cycles=True), "without whole_cycles"),
    ],
    ids=str,
)
def test_configurations_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        GPT(config(**changes))


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass


def formula(model, tokens):
    """The whole GPT for tokens (T,), float64, one head at a time, from the model's weights alone."""
    cfg, w = model.cfg, {name: p.detach().double() for name, p in model.named_parameters()}
    T, d = len(tokens), cfg.n_embd // cfg.n_head
    n = torch.arange(T, dtype=torch.float64)
    angle = n[:, None] * torch.tensor([cfg.theta ** (-2 * m / d) for m in range(d // 2)], dtype=torch.float64)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def position(x):
        if cfg.pos != "rope":
            return x
        z = torch.complex(x[:, : d // 2], x[:, d // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], dim=-1)

    x = w["embedding.weight"][tokens]
    for i in range(cfg.n_layer):
        block = f"blocks.{i}."
        q, k, v = (norm(x, w[block + "norm1.weight"]) @ w[block + "attention.qkv.weight"].T).split(cfg.n_embd, dim=-1)
        if cfg.qk_norm:
            q, k = (torch.cat([(p - p.mean(-1, True)) / (p.var(-1, False, True) + 1e-5).sqrt() for p in z.split(d, -1)], -1) for z in (q, k))
        heads = []
        for h in range(cfg.n_head):
            own = slice(h * d, (h + 1) * d)
            logits = position(q[:, own]) @ position(k[:, own]).T / math.sqrt(d)
            distance = (n[:, None] - n).clamp(min=0)
            if cfg.pos == "alibi":
                logits -= 2 ** (-8 * (h + 1) / cfg.n_head) * distance
            if cfg.pos == "kerple":
                r1, r2 = (w[f"{block}attention.position.r{i}"][h].item() for i in (1, 2))
                logits -= max(r1, 0.01) * torch.log(1 + max(r2, 0.01) * distance)
            if cfg.pos == "fire":
                w1, b1, w2, b2, c, L = (w[f"{block}attention.position.{x}"] for x in ("w1", "b1", "w2", "b2", "c", "L"))
                share = torch.log(1 + c.abs() * distance) / torch.log(1 + c.abs() * torch.maximum(n, 512 * L.abs()))[:, None]
                logits += b2[h] + sum(w2[h, unit] * (w1[unit] * share + b1[unit]).clamp(min=0) for unit in range(32))
            weight = logits.masked_fill(n[:, None] < n, -math.inf).exp()
            heads.append(weight / weight.sum(-1, keepdim=True) @ v[:, own])
        x = x + torch.cat(heads, dim=-1) @ w[block + "attention.out.weight"].T
        gate, up = (norm(x, w[block + "norm2.weight"]) @ w[block + "mlp.gate_up.weight"].T).split(cfg.n_hidden, dim=-1)
        x = x + (gate / (1 + (-gate).exp()) * up) @ w[block + "mlp.down.weight"].T
    return norm(x, w["norm.weight"]) @ w["head.weight"].T


FORMULAS = [(pos, False) for pos in ("rope", "alibi", "kerple", "fire", "nope")] + [("rope", True), ("nope", True)]


@pytest.mark.parametrize("pos, qk_norm", FORMULAS)  # FoPE's rotation has its formula in test_fope.py
def test_forward_is_the_formula(pos, qk_norm):
    model, tokens, targets = loud(pos, qk_norm=qk_norm), some_tokens(3, 40), some_tokens(3, 40, seed=1)
    logits, loss = model(tokens, targets)
    want = torch.stack([formula(model, row) for row in tokens])
    torch.testing.assert_close(logits.double(), want, atol=2e-5, rtol=0)
    assert torch.equal(model(tokens), logits)
    nats = [math.log(sum(math.exp(z) for z in row)) - row[t] for row, t in zip(want.flatten(0, 1).tolist(), targets.flatten().tolist())]
    assert loss.item() == pytest.approx(sum(nats) / len(nats), abs=1e-5)


def test_each_position_embedding_reaches_the_attention():
    """All else is the same in these four models, and yet no two give the same logits."""
    logits = [loud(pos)(some_tokens(1, 40)) for pos in POSITIONS]
    assert all((a - b).abs().max() > 0.5 for i, a in enumerate(logits) for b in logits[:i])


@pytest.mark.parametrize("pos", POSITIONS)
def test_no_token_sees_the_future(pos):
    model, tokens = loud(pos), some_tokens(2, 40)
    want = model(tokens)
    for t in (1, 20, 39):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 50
        got = model(changed)
        torch.testing.assert_close(got[:, :t], want[:, :t], atol=1e-6, rtol=0)
        assert ((got[:, t:] - want[:, t:]).abs().amax(-1) > 1e-4).all()  # and all that come later do see it


@pytest.mark.parametrize("n", [1, 3, 40])
def test_last_is_a_slice(n):
    model, tokens = loud(), some_tokens(2, 40)
    got = model(tokens, last=n)
    assert got.shape == (2, n, 50)
    torch.testing.assert_close(got, model(tokens)[:, -n:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("pos", ["kerple", "fire"])
def test_learned_bias_in_pieces_is_the_formula(pos):
    """600 tokens are three pieces of queries; FIRE's L, as trained, lies within them. Decoding goes on after a whole piece."""
    model, tokens = loud(pos, n_layer=1), some_tokens(1, 600)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("position.L"):
                weight.fill_(-0.4)  # of 512; its absolute value counts
    want = formula(model, tokens[0])
    torch.testing.assert_close(model(tokens)[0].double(), want, atol=5e-5, rtol=0)
    cache = model.new_cache()
    model(tokens[:, :500], cache=cache)
    steps = [model(tokens[:, t : t + 1], cache=cache)[0, 0] for t in range(500, 520)]
    torch.testing.assert_close(torch.stack(steps).double(), want[500:520], atol=5e-5, rtol=0)


@pytest.mark.parametrize("pos", ["kerple", "fire"])
def test_learned_bias_learns(pos):
    """The loss against every number of the bias: its gradient is its slope, in float64."""
    model, tokens, targets = loud(pos, n_layer=1).double(), some_tokens(2, 24), some_tokens(2, 24, seed=1)
    position = model.blocks[0].attention.position
    names, values = zip(*position.named_parameters())
    full = {f"blocks.0.attention.position.{name}" for name in names}
    assert full == {name for name, _ in model.named_parameters() if ".position." in name}

    def loss(*values):
        named = {f"blocks.0.attention.position.{name}": value for name, value in zip(names, values)}
        return F.cross_entropy(torch.func.functional_call(model, named, (tokens,)).flatten(0, 1), targets.flatten())

    if pos == "kerple":  # at its bound a parameter is held, and still has a gradient
        low = [value.detach().clone() for value in values]
        low[1].fill_(0.005).requires_grad_()
        at_bound, above = loss(*low), loss(low[0], torch.full_like(low[1], 0.01))
        assert at_bound.item() == above.item() and torch.autograd.grad(at_bound, low[1])[0].abs().min() > 0
    assert torch.autograd.gradcheck(loss, [value.detach().clone().requires_grad_() for value in values], eps=1e-7, atol=1e-7)


@pytest.mark.parametrize("pos", POSITIONS)
def test_gradient_is_the_slope_of_the_loss(pos):
    """Along a random direction in every weight: (loss(w + e) - loss(w - e)) / 2|e| against gradient * e / |e|."""
    model, tokens, targets = loud(pos), some_tokens(4, 24), some_tokens(4, 24, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.embedding.weight.mul_(50)  # at 0.01 the loss bends too sharply for a difference

    def loss():
        return F.cross_entropy(model(tokens).double().flatten(0, 1), targets.flatten())

    loss().backward()
    for name, weight in model.named_parameters():
        if ".position." in name:  # FIRE's ReLU bends too sharply for a difference in float32
            continue
        direction = torch.randn(weight.shape, generator=generator)
        direction *= 3e-3 * weight.detach().norm() / direction.norm()
        with torch.no_grad():
            weight.add_(direction)
            ahead = loss().item()
            weight.sub_(2 * direction)
            behind = loss().item()
            weight.add_(direction)
        expected = (weight.grad * direction).sum().item()
        typical = weight.grad.norm().item() * direction.norm().item() / math.sqrt(weight.numel())  # for a random direction
        assert (ahead - behind) / 2 == pytest.approx(expected, abs=0.005 * typical, rel=0.005), name


@pytest.mark.parametrize("n_head", [2, 3])
def test_rope_model_is_llama(n_head):
    """transformers' LlamaForCausalLM with our weights gives our logits, loss and gradients: every part at once, by other hands."""
    torch.manual_seed(0)
    ours = GPT(GPTConfig(pos="rope", n_layer=3, n_head=n_head, n_embd=48, n_hidden=80, vocab_size=100, init_std=0.1))
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    llama = llama_of(ours)
    tokens, targets = torch.randint(100, (2, 300)), torch.randint(100, (2, 300))
    theirs = llama(tokens, labels=targets, shift_labels=targets)
    logits, loss = ours(tokens, targets)
    assert logits.abs().max() > 1
    torch.testing.assert_close(logits, theirs.logits, atol=1e-4, rtol=0)
    assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    loss.backward()
    theirs.loss.backward()
    for name, gradient in in_llama_names(ours, lambda parameter: parameter.grad).items():
        torch.testing.assert_close(gradient, llama.get_parameter(name).grad, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize("pos", POSITIONS)
def test_decoding_with_a_cache_is_the_full_pass(pos):
    """A prompt of 10, then token by token to 64: four times the training length."""
    model, tokens = loud(pos), some_tokens(3, 64)
    want = loud(pos)(tokens)
    cache = model.new_cache()
    torch.testing.assert_close(model(tokens[:, :10], cache=cache), want[:, :10], atol=2e-5, rtol=0)
    for t in range(10, 64):
        got = model(tokens[:, t : t + 1], cache=cache)
        torch.testing.assert_close(got[:, 0], want[:, t], atol=2e-5, rtol=0)
    assert len(cache) == 2 and cache[0][0].shape[:3] == (3, 2, 64)


def test_a_cache_takes_one_token_at_a_time():
    """More would need a mask that is aligned to the lower right."""
    model, cache = loud(), loud().new_cache()
    model(some_tokens(1, 4), cache=cache)
    with pytest.raises(AssertionError, match="one by one"):
        model(some_tokens(1, 2), cache=cache)


@pytest.mark.parametrize("pos", POSITIONS)
def test_greedy_takes_the_likeliest_each_time(pos):
    model, prompt = loud(pos), some_tokens(2, 5)
    want = prompt
    for _ in range(30):
        want = torch.cat([want, model(want)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(prompt, 30), want)
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_sampling_repeats_under_one_seed():
    model, prompt = loud(), some_tokens(2, 5)

    def sample(seed, temperature=1.0):
        return model.generate(prompt, 30, temperature, torch.Generator().manual_seed(seed))

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(sample(1)[:, :5], prompt)
    assert torch.equal(sample(1, temperature=1e-4), model.generate(prompt, 30))  # cold is greedy


def test_temperature_divides_the_logits():
    model, prompt, draws = loud(), some_tokens(1, 5), 6_000
    share = (model(prompt)[0, -1].double() / 2.0).softmax(-1)
    got = model.generate(prompt.expand(draws, -1), 1, 2.0, torch.Generator().manual_seed(0))[:, -1]
    error = (got.bincount(minlength=50) / draws - share).abs()
    assert (error < 5 * (share / draws).sqrt() + 1e-3).all()
    assert ((model(prompt)[0, -1].softmax(-1) - share).abs() > 5 * (share / draws).sqrt() + 1e-3).any()  # 1.0 would fail


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save(path, model, **changes):
    torch.save({"step": 7, "config": asdict(model.cfg) | {"data": "data/builtin"}, "model": model.state_dict(), "tokenizer": "bytes", **changes}, path)
    return path


@pytest.mark.parametrize("pos", POSITIONS)
def test_checkpoint_round_trip(tmp_path, pos):
    """FoPE's coefficients come from the file: another draw in them than its seed's must survive."""
    model, tokens = loud(pos), some_tokens(2, 40)
    if pos == "fope":
        model.load_state_dict({k: v * 2 if k.endswith("coef") else v for k, v in model.state_dict().items()})
    path = save(tmp_path / "ckpt.pt", model)
    for where in (path, str(path), tmp_path):  # the file, or the folder it lies in
        loaded, checkpoint = load_model(where)
        assert checkpoint["step"] == 7 and checkpoint["tokenizer"] == "bytes"
        assert loaded.cfg == model.cfg and not loaded.training
        torch.testing.assert_close(loaded(tokens), model(tokens), atol=1e-6, rtol=0)


def test_configuration_may_hold_more_than_the_model_needs(tmp_path):
    """train.py saves its whole configuration."""
    model = loud()
    path = save(tmp_path / "a.pt", model, config={**asdict(model.cfg), "lr": 1e-3})
    assert load_model(path)[0].cfg == model.cfg


class Surprise:
    """Not a tensor nor a plain value: unpickling it would run code."""

    def __reduce__(self):
        return print, ("this must not run",)


def damaged(path, kind):
    if kind == "text":
        path.write_text("hello\n" * 100)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        data = save(path, loud()).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "no file in the folder":
        path.mkdir()
    elif kind != "missing":
        torch.save({"list": [1, 2], "tensor": torch.zeros(3), "keys": {"step": 1, "model": {}}, "code": Surprise()}[kind], path)


@pytest.mark.parametrize("kind", ["missing", "no file in the folder", "empty", "text", "truncated", "list", "tensor", "keys", "code"])
def test_what_is_no_checkpoint(tmp_path, capfd, kind):
    path = tmp_path / "broken.pt"
    damaged(path, kind)
    for load in (load_checkpoint, load_model):
        with pytest.raises(ValueError) as caught:
            load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "must not run" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "change",
    [dict(n_layer=3), dict(n_embd=64), dict(n_hidden=48), dict(pos="rope"), dict(train_len=64), dict(n_head="2")],
    ids=str,
)
def test_weights_of_another_shape(tmp_path, change):
    model = loud()
    path = save(tmp_path / "other.pt", model, config={**asdict(model.cfg), **change})
    with pytest.raises(ValueError) as caught:
        load_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The device, the command


@pytest.mark.parametrize(
    "device, dtype, words",
    [("cpu", "float16", "float16.*bfloat16 or float32"), ("nonsense", "auto", "nonsense"), ("cuda:99", "auto", "cuda:99")],
)
def test_devices_refused(device, dtype, words):
    with pytest.raises(ValueError, match=words) as caught:
        find_device(device, dtype)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_device_and_arithmetic(dtype):
    device, name, autocast = find_device("cpu", dtype)
    assert device == torch.device("cpu") and name == dtype
    for _ in range(2):  # it serves each step anew
        with autocast():
            assert loud()(some_tokens(1, 4)).dtype == getattr(torch, dtype)
    assert find_device("cpu")[1] in ("float32", "bfloat16")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's habit")
def test_memory_of_large_tensors_is_kept():
    """In a process of its own: a 256 MB tensor like one before costs no page faults. Without find_device: 65 537, every time.

    The last eight of sixteen: something small may take the beginning of the free piece, and the next tensor needs a new one. Up
    to five do, by where the process happens to lie in memory (28 processes: none, four or five); then all find room.
    """
    code = """import resource, torch; from model import find_device; find_device("cpu")
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(16):
    torch.ones(2**26)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(max(b - a for a, b in zip(faults[8:], faults[9:])))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < 100


def test_bfloat16_autocast_is_near_float32():
    for pos in POSITIONS:
        model, tokens = loud(pos), some_tokens(2, 40)
        with find_device("cpu", "bfloat16")[2]():
            _, loss = model(tokens, tokens)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(model(tokens, tokens)[1].item(), rel=0.01)


def command(*arguments):
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", "LOCAL_RANK": "0"}
    done = subprocess.run([sys.executable, ROOT / "model.py", *arguments], capture_output=True, encoding="utf-8", env=env)
    return done.returncode, done.stdout, done.stderr


def test_command_continues_the_prompt(tmp_path):
    """A model made by hand: nothing but embedding and head, and the head knows each byte's successor."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=128, n_hidden=8, vocab_size=320, train_len=16))
    with torch.no_grad():
        model.embedding.weight.copy_(torch.randn(320, 128, generator=torch.Generator().manual_seed(0)).sign())
        model.head.weight.copy_(model.embedding.weight.roll(1, dims=0))
        model.blocks[0].attention.out.weight.zero_()
        model.blocks[0].mlp.down.weight.zero_()
    path = save(tmp_path / "a.pt", model)
    assert command(path, "abc", "--tokens=5", "--temperature=0") == (0, "abcdefgh\n", "")


@pytest.mark.parametrize("kind", ["truncated", "missing"])
def test_command_refuses_a_bad_checkpoint(tmp_path, kind):
    path = tmp_path / "broken.pt"
    damaged(path, kind)
    status, out, err = command(path, "abc")
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("model.py: ") and str(path) in err
