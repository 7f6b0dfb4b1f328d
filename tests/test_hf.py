"""hf/: Llama-family models in, Hugging Face folders out. The oracle is transformers."""

import base64
import json
import shutil

import pytest
import torch
from conftest import make_llama, make_run
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

import sample
import train
from data import prepare, tokenizer
from fope import FoPE, rope_frequencies
from hf import convert
from model import GPT, GPTConfig, load_model

transformers = pytest.importorskip("transformers")
N = 64
SMALL = dict(n_layer=2, n_head=4, n_embd=64, n_hidden=96, vocab_size=320, train_len=N, init_std=0.1)


def text(rows, length):
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(1))


def imported(folder, run):
    convert.main(["from", str(folder), str(run)])
    return load_model(run)[0]


def exported(tmp_path, *flags, **options):
    """A random model of ours, and the Hugging Face folder that it becomes."""
    model = make_run(tmp_path / "run", **SMALL | options)
    convert.main(["to", str(tmp_path / "run"), str(tmp_path / "hf"), *flags])
    return model, tmp_path / "hf"


def load(folder, trust=True, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, **options).eval()


def assert_same_logits(ours, theirs):
    tokens = text(2, 4 * N)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def read(file):
    return json.loads(file.read_text())


# ----------------------------------------------------------------------------------------------------------------------
# In


def scaled(kind, **more):
    facts = dict(rope_type=kind, rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
    return dict(rope_parameters=facts | more)


INPUTS = {
    "grouped heads of 8": dict(num_key_value_heads=2, head_dim=8),
    "tied, other epsilon and base": dict(tie_word_embeddings=True, rms_norm_eps=1e-3, rope_theta=500.0),
    "linear": scaled("linear"),
    "llama3": scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0),
    "yarn": scaled("yarn"),
    "yarn with its own temperature": scaled("yarn", attention_factor=1.5),
    "yarn with DeepSeek's temperature": scaled("yarn", mscale=1.0, mscale_all_dim=0.5),
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_imported_llama_has_the_logits_of_transformers_and_exported_again_too(tmp_path, name):
    theirs = make_llama(tmp_path / "llama", **INPUTS[name])
    ours = imported(tmp_path / "llama", tmp_path / "run")
    assert_same_logits(ours, theirs)
    convert.main(["to", str(tmp_path / "run"), str(tmp_path / "again")])
    assert_same_logits(ours, load(tmp_path / "again"))


def test_a_sliding_window_is_refused_where_it_would_act(tmp_path, refused):
    """Evaluation goes up to 16 N."""
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=257, **heads)
    for name, window in {"wide": 16 * N, "narrow": 16 * N - 1}.items():
        config = transformers.MistralConfig(**shape, max_position_embeddings=N, sliding_window=window)
        theirs = transformers.MistralForCausalLM(config).eval()
        theirs.save_pretrained(tmp_path / name)
        convert.byte_level_bpe(tokenizer.get_tokenizer("bytes"), tmp_path / name)
        if name == "wide":
            assert_same_logits(imported(tmp_path / name, tmp_path / "run"), theirs)
        else:
            assert "sliding window" in refused(convert.main, "from", tmp_path / name, tmp_path / "new")


def test_intern_s1_coefficients_give_its_attention():
    """Its code: cos(position omega) @ cos_coef per key-value head, and 1 for the clipped pairs, for sine too."""
    d, K, theta, length = 128, 4, 5e6, 262_144
    omega = rope_frequencies(d, theta)
    M = int((omega > 2 * torch.pi / length).sum())
    generator = torch.Generator().manual_seed(0)
    cos_coef, sin_coef = torch.eye(M) + 0.05 * torch.randn(2, K, M, M, generator=generator)
    position = FoPE(n_head=2 * K, n_kv_head=K, head_dim=d, train_len=length, theta=theta, seed=0, zero_phase=False)
    position.load_state_dict({"coef": convert.intern_s1_coefficients(cos_coef, sin_coef)})
    at = torch.tensor([0, 100, 5000])
    angle, ones = at.double()[:, None] * omega[:M], torch.ones(K, 3, d // 2 - M, dtype=torch.float64)
    cos = torch.cat([angle.cos() @ cos_coef.double(), ones], -1)
    sin = torch.cat([angle.sin() @ sin_coef.double(), ones], -1)
    torch.testing.assert_close(position.cos_sin(at).double(), torch.stack([cos, sin]), atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Out

FLOOR = dict(fourier_series=False, zero_phase=True)
OUTPUTS = {  # options of the model, whether it needs modeling_fope.py
    "rope with log n": (dict(pos="rope", logn=2.0), True),
    "rope with a temperature": (dict(pos="rope", logit_scale=1.3), True),
    "rope-a": (dict(pos="rope", whole_cycles=True), True),
    "the floor alone, grouped, tied": (FLOOR | dict(n_kv_head=2, tied=True), False),
    "the floor alone, as in the release": (FLOOR | dict(zero_phase=False), True),
    "the floor alone, scaled": (FLOOR | dict(scaling="linear", scale=2.0), True),
    "neither half of FoPE": (dict(fourier_series=False, clip_floor=False), False),
    "fope": (dict(zero_phase=True), True),
    "fope, grouped, tied, with log n": (dict(zero_phase=False, n_kv_head=2, tied=True, logn=2.0, sigma=3.0), True),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_exported_model_has_our_logits_and_writes_our_text(tmp_path, name):
    options, remote = OUTPUTS[name]
    ours, folder = exported(tmp_path, **options)
    theirs = load(folder)
    assert (folder / "modeling_fope.py").exists() == remote == (type(theirs).__name__ == "FopeLlamaForCausalLM")
    assert_same_logits(ours, theirs)
    pads = torch.tensor([0, 5])  # left padding, chunks and the cache at once
    mask = (torch.arange(2 * N) >= pads[:, None]).long()
    prompt = text(2, 2 * N).where(mask == 1, 256)
    greedy = dict(do_sample=False, max_new_tokens=8, pad_token_id=256)
    assert torch.equal(theirs.generate(prompt, attention_mask=mask, **greedy), ours.generate(prompt, 8, pads=pads))


def test_an_exported_fope_decodes_with_a_static_cache_compiled(tmp_path):
    ours, folder = exported(tmp_path, n_kv_head=2)
    theirs, prompt = load(folder), text(2, N - 4)
    theirs.forward = torch.compile(theirs.forward, backend="eager", fullgraph=True)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=256, eos_token_id=None)
    written = theirs.generate(prompt, cache_implementation="static", **options)
    assert torch.equal(written, ours.generate(prompt, 8))


def test_an_exported_fope_is_never_taken_for_a_plain_llama(tmp_path):
    ours, folder = exported(tmp_path, tied=True)
    load(folder).save_pretrained(tmp_path / "again")  # as after fine-tuning there
    assert_same_logits(ours, load(tmp_path / "again"))
    for plain in (folder, tmp_path / "again"):
        with pytest.raises(KeyError, match="fope"):
            load(plain, trust=False)
    # its tokenizer is a plain one: transformers does not ask whether to run code
    assert transformers.AutoTokenizer.from_pretrained(folder)("abc")["input_ids"] == [97, 98, 99]


@pytest.mark.parametrize("options", [dict(pos="rope", theta=1e5, scaling="yarn", scale=4.0, original_len=16), {}])
def test_version_4_of_transformers_finds_the_same_positions(tmp_path, options):
    """It reads rope_theta and rope_scaling, as version 5 does without rope_parameters."""
    ours, folder = exported(tmp_path, logit_scale=1.3, **options)
    config = read(folder / "config.json")
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    if options:
        assert_same_logits(ours, load(folder))
    else:
        with pytest.raises(KeyError, match="fope"):
            load(folder, trust=False)


def test_the_floor_alone_keeps_as_many_pairs_in_transformers():
    for head_dim in range(4, 130, 2):
        for train_len in (64, 4096):
            shape = dict(n_layer=1, n_head=1, n_embd=head_dim, n_hidden=8, vocab_size=8, train_len=train_len)
            model = GPT(GPTConfig(**FLOOR, **shape))
            config = transformers.LlamaConfig(head_dim=head_dim, rope_parameters=convert.rope_parameters(model))
            rope = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
            assert (rope.inv_freq > 0).sum() == len(model.blocks[0].attention.position.omega)


def test_coefficients_stay_in_float32_and_the_floor_at_n(tmp_path):
    ours, folder = exported(tmp_path, "--dtype=bfloat16", sigma=3.0)
    theirs = load(folder, dtype=torch.bfloat16, max_position_embeddings=16 * N)
    for block, layer in zip(ours.blocks, theirs.model.layers):
        position = layer.self_attn.position
        assert layer.self_attn.q_proj.weight.dtype == torch.bfloat16 and position.coef.dtype == torch.float32
        torch.testing.assert_close(position.coef, block.attention.position.coef, rtol=0, atol=0)
        torch.testing.assert_close(position.omega, block.attention.position.omega, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tokenizer of ranks, and the tokenizer.json that it becomes."""
    folder = tmp_path_factory.mktemp("pair")
    ranks = [bytes([b]) for b in range(256)]
    ranks += [b"to", b"ke", b"toke", b"ns", b"tokens", b" tokens", b"af", b"caf", b"\n\n"]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    (folder / "t.tiktoken").write_bytes(b"".join(lines))
    ours = tokenizer.get_tokenizer(str(folder / "t.tiktoken"))
    convert.byte_level_bpe(ours, folder)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\r\u3000\x85\x1c'stoken"))))
@example("it's a naïve café, 123  tokens\n\n \U0001f600 \n\n\tx \n")
@settings(max_examples=500)
def test_an_exported_tokenizer_has_our_tokens(pair, text):
    ours, theirs = pair
    assume(tokenizer.END not in text)  # transformers takes it for the token
    assert theirs.eos_token_id == ours.eot and theirs(text)["input_ids"] == ours.encode_ordinary(text)
    assert theirs.decode(theirs(text)["input_ids"]) == text


def test_a_llama_trained_as_fope_leaves_with_the_tokenizer_that_it_came_with(tmp_path, capsys):
    """BOS, padding, several EOS, a chat template in a file of its own. The data's folder is gone by then."""
    llama, run, data, out, fope = (tmp_path / name for name in ("llama", "run", "data", "out", "fope"))
    ids = {"bos_token_id": 257, "eos_token_id": [256, 10], "pad_token_id": 257}
    make_llama(llama, vocab_size=258, num_key_value_heads=2, tie_word_embeddings=True, **ids)
    generation = ids | {"temperature": 0.5, "do_sample": True}
    (llama / "generation_config.json").write_text(json.dumps(generation))
    (llama / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    bpe = Tokenizer.from_file(str(llama / "tokenizer.json"))
    bpe.add_special_tokens(["<s>"])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    bpe.save(str(llama / "tokenizer.json"))

    imported(llama, run)
    (tmp_path / "text.txt").write_text("hello world " * 600)
    prepare.main([f"{tmp_path}/text.txt", f"--tokenizer={run}/tokenizer.json", f"--out={data}"])
    argv = f"--init_from={run} --pos=fope --data={data} --out={out} --batch_tokens=256 --steps=3 --warmup=0".split()
    train.train(train.parse_flags([*argv, "--recompute", "--eval_trials=0", "--compile=off", "--device=cpu"]))
    shutil.rmtree(data)
    sample.main([str(out), "hello world", "--tokens=0", "--device=cpu"])
    assert capsys.readouterr().out.endswith("\nhello world\n")  # the prompt gets a BOS, and the reader does not see it
    convert.main(["to", str(out), str(fope)])
    ours, checkpoint = load_model(out)
    assert (ours.cfg.pos, ours.cfg.n_kv_head, ours.cfg.tied, checkpoint["step"]) == ("fope", 2, True, 3)
    assert_same_logits(ours, load(fope))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (fope / name).read_bytes() == (llama / name).read_bytes()
    assert generation.items() <= read(fope / "generation_config.json").items()
    assert ids.items() <= read(fope / "config.json").items()
