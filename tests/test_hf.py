"""hf/: Llama-family models in, Hugging Face folders out. The oracle is transformers; beyond N, a formula in float64."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_llama, make_run
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

import sample
import train
from data import prepare, tokenizer
from data.passkey import passkey_document
from fope import FoPE, rope_frequencies
from hf import convert
from model import GPT, GPTConfig, load_model
from paper import experiments

transformers = pytest.importorskip("transformers")
N = 64
SMALL = dict(n_layer=2, n_head=4, n_embd=64, n_hidden=96, vocab_size=320, train_len=N, init_std=0.1)
LLAMA = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=257)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(rope_type="llama3", factor=4.0, original_max_position_embeddings=16, low_freq_factor=1.0,
              high_freq_factor=4.0)  # fmt: skip


def text(rows, length):
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(1))


def exported(tmp_path, *flags, **options):
    model = make_run(tmp_path / "run", **SMALL | options)
    convert.main(["to", str(tmp_path / "run"), str(tmp_path / "hf"), *flags])
    return model, tmp_path / "hf"


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def edit(folder, **changes):
    """Change fields of config.json. None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def imported(folder, run):
    """Our model of a Hugging Face folder, and transformers' own."""
    convert.main(["from", str(folder), str(run)])
    return load_model(run)[0], transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_same_logits(ours, theirs, rows=1, length=4 * N, atol=1e-4):
    with torch.no_grad():
        torch.testing.assert_close(ours(text(rows, length)), theirs(text(rows, length)).logits, atol=atol, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# In


def another_lm_head(folder):
    """Tied, says the config. But another matrix is stored."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def a_stale_index(folder):
    """Shards and their index from before the model was fine-tuned and saved as one file."""
    weights = load_file(folder / "model.safetensors")
    save_file({name: x * 0.5 for name, x in weights.items()}, folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


INPUTS = {  # options of the model, what happens to its folder
    "grouped heads of 8": (dict(num_key_value_heads=2, head_dim=8), None),
    "tied, other epsilon and base": (dict(tie_word_embeddings=True, rms_norm_eps=1e-3, rope_theta=500.0), None),
    "linear": (dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)), None),
    "llama3": (dict(rope_parameters=LLAMA3 | dict(rope_theta=1e4)), None),
    "yarn": (dict(rope_parameters=YARN | dict(rope_theta=1e4)), None),
    "yarn with its own temperature": (dict(rope_parameters=YARN | dict(rope_theta=1e4, attention_factor=1.5)), None),
    # a model card says: add rope_scaling to config.json. It wins over rope_parameters
    "both spellings": (dict(rope_theta=1e5), lambda folder: edit(folder, rope_scaling=YARN)),
    "the older spelling": ({}, lambda folder: edit(folder, rope_parameters=None, rope_theta=1e5, rope_scaling=YARN)),
    "no max_position_embeddings": ({}, lambda folder: edit(folder, max_position_embeddings=None)),
    "tied, with another lm_head": (dict(tie_word_embeddings=True), another_lm_head),
    "a stale index": ({}, a_stale_index),
    "shards": (dict(shards="50KB"), None),
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_imported_llama_has_the_logits_of_transformers_and_exported_again_too(tmp_path, name):
    options, change = INPUTS[name]
    make_llama(tmp_path / "llama", **options)
    if change:
        change(tmp_path / "llama")
    ours, theirs = imported(tmp_path / "llama", tmp_path / "run")
    assert_same_logits(ours, theirs, rows=2)
    convert.main(["to", str(tmp_path / "run"), str(tmp_path / "again")])
    assert_same_logits(ours, load(tmp_path / "again"))


def test_an_imported_llama_is_trained_as_fope_and_exported(tmp_path):
    make_llama(tmp_path / "llama", num_key_value_heads=2, tie_word_embeddings=True)
    convert.main(["from", str(tmp_path / "llama"), str(tmp_path / "run")])
    tokens = text(1, 2000)[0].numpy()
    data = tokenizer.get_tokenizer(str(tmp_path / "run" / "tokenizer.json"))
    prepare.write(tmp_path / "data", data, tokens, tokens, {"source": "random bytes"})
    argv = f"--init_from={tmp_path}/run --pos=fope --data={tmp_path}/data --out={tmp_path}/out".split()
    argv += "--batch_tokens=256 --steps=3 --warmup=0 --recompute --eval_trials=0 --compile=off --device=cpu".split()
    assert train.train(train.parse_flags(argv))[1]
    convert.main(["to", str(tmp_path / "out"), str(tmp_path / "fope")])
    theirs, (ours, checkpoint) = load(tmp_path / "fope"), load_model(tmp_path / "out")
    assert (checkpoint["config"]["n_kv_head"], checkpoint["config"]["tied"], checkpoint["step"]) == (2, True, 3)
    with torch.no_grad():
        torch.testing.assert_close(theirs(text(1, 2 * N)).logits, ours(text(1, 2 * N)), atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Out

OUTPUTS = {  # options of the model, whether it needs modeling_fope.py
    "rope, grouped, tied": (dict(pos="rope", n_kv_head=2, tied=True), False),
    "rope, yarn": (dict(pos="rope", scaling="yarn", scale=4.0, original_len=16, logit_scale=1.3), False),
    "rope with log n": (dict(pos="rope", logn=2.0), True),
    "rope-a": (dict(pos="rope", whole_cycles=True), True),
    "the floor alone": (dict(fourier_series=False, zero_phase=True), False),
    "the floor alone, grouped, tied": (dict(fourier_series=False, zero_phase=True, n_kv_head=2, tied=True), False),
    "the floor alone, as in the release": (dict(fourier_series=False, zero_phase=False), True),
    "neither half of FoPE": (dict(fourier_series=False, clip_floor=False), False),
    "fope": (dict(zero_phase=True), True),
    "fope, grouped, tied, with log n": (dict(zero_phase=False, n_kv_head=2, tied=True, logn=2.0, sigma=3.0), True),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_exported_model_has_our_logits(tmp_path, name):
    options, remote = OUTPUTS[name]
    ours, folder = exported(tmp_path, **options)
    theirs = load(folder)
    assert (folder / "modeling_fope.py").exists() == remote == (type(theirs).__name__ == "FopeLlamaForCausalLM")
    tokens = text(2, 4 * N)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=0)
    greedy = dict(do_sample=False, max_new_tokens=8, pad_token_id=256)
    pads = torch.tensor([0, 5])  # left padding, chunks and the cache at once
    mask = (torch.arange(2 * N) >= pads[:, None]).long()
    prompt = tokens[:, : 2 * N].where(mask == 1, 256)
    generated = theirs.generate(prompt, attention_mask=mask, **greedy)
    assert torch.equal(generated, ours.generate(prompt, 8, pads=pads))


@pytest.mark.parametrize("name", ["neither half of FoPE", "the floor alone", "fope"])
def test_an_exported_model_has_our_logits_at_16384_tokens(tmp_path, name):
    """There, transformers' angles, position times frequency in float32, are least exact."""
    ours, folder = exported(tmp_path, **OUTPUTS[name][0] | dict(train_len=4096, n_layer=1, n_head=2))
    assert_same_logits(ours, load(folder), length=16_384)


def test_the_floor_alone_keeps_as_many_pairs_in_transformers():
    for head_dim in range(4, 130, 2):
        for train_len in (16, 64, 500, 4096, 10**6):
            options = dict(n_embd=head_dim, n_head=1, fourier_series=False, zero_phase=True, train_len=train_len)
            model = GPT(GPTConfig(**SMALL | options))
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


HOSTILE = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\r\u3000\x85\x1c'stoken")))


def test_an_exported_tokenizer_has_our_tokens(tmp_path):
    ranks = {bytes([b]): b for b in range(256)}
    for pair in (b"to", b"ke", b"toke", b"ns", b"tokens", b" tokens", b"af", b"caf", b"\n\n"):
        ranks[pair] = len(ranks)
    file = tmp_path / "t.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    for ours in (tokenizer.get_tokenizer("bytes"), tokenizer.get_tokenizer(str(file))):
        folder = tmp_path / ours.name
        folder.mkdir()
        convert.byte_level_bpe(ours, folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs.eos_token_id == ours.eot

        @given(HOSTILE)
        @example("it's a naïve café, 123  tokens\n\n \U0001f600 \n\n\tx \n")
        @settings(max_examples=500, deadline=None)
        def has_our_tokens(text):
            assume(tokenizer.END not in text)  # transformers takes it for the token
            assert theirs(text)["input_ids"] == ours.encode_ordinary(text)  # noqa: B023
            assert theirs.decode(theirs(text)["input_ids"]) == text  # noqa: B023

        has_our_tokens()


@pytest.mark.slow
def test_table_1_runs_on_a_small_llama(tmp_path):
    """Every kind of command of `experiments.py table1`, at N = 64. The oracle of lm_eval's answers is our GPT."""
    make_llama(tmp_path / "llama", num_key_value_heads=2)
    words = " ".join(f"word {i}" for i in range(500))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": words[i:]}) + "\n" for i in range(20)))
    questions, choices = [f"What is {i} plus {i}?" for i in range(4)], ["one", "two", "three"]
    lines = [json.dumps({"question": question, "choices": choices}) + "\n" for question in questions]
    (tmp_path / "q.jsonl").write_text("".join(lines))
    task = {"task": "chooses", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.jsonl")}}, "doc_to_text": "{{question}}",
            "doc_to_choice": "choices", "doc_to_target": 0, "metric_list": [{"metric": "acc"}]}  # fmt: skip
    (tmp_path / "chooses.yaml").write_text(json.dumps(task))  # YAML contains JSON

    smaller = {
        "SmolLM-1.7B": f"{tmp_path}/llama",
        "gutenberg --tokens=1e9": f"{tmp_path}/text.jsonl",
        "data/gutenberg-smollm": f"{tmp_path}/data",
        "out/": f"{tmp_path}/out/",
        "--train_len=4096": "--train_len=64",
        "--batch_tokens=524288 --steps=1907 --warmup=95": "--batch_tokens=256 --steps=3 --warmup=1 --compile=off",
        "--dtype=bfloat16": "--dtype=float32",  # what lm_eval then computes in
        "max_length=32768": "max_length=256",
        "--log_samples": f"--include_path {tmp_path} --device cpu --log_samples",
        "python ": f"{sys.executable} ",
        "torchrun ": f"{sys.executable} -m torch.distributed.run ",
        "lm_eval ": f"{sys.executable} -m lm_eval ",
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}
    for line in "\n".join(experiments.TABLE1).splitlines()[1:6]:  # without the download, and up to RoPE's commands
        for old, new in smaller.items():
            line = line.replace(old, new)
        line = re.sub(r"--tasks \S+", "--tasks chooses", line)
        run = subprocess.run(line.split(), env=os.environ | offline, cwd=convert.ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr

    (file,) = tmp_path.glob("out/table1-fope-scores/*/samples_chooses_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    ours, checkpoint = load_model(tmp_path / "out/table1-fope")
    assert (ours.cfg.pos, ours.cfg.sigma, checkpoint["step"]) == ("fope", 0.6, 3)
    for question, answers in zip(questions, samples, strict=True):
        for choice, ((likelihood, _),) in zip(choices, answers["resps"], strict=True):
            tokens = torch.tensor([list(f"{question} {choice}".encode())])
            with torch.no_grad():
                logits = ours(tokens)[0, len(question) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, tokens[0, len(question) :, None]).sum()
            assert abs(float(likelihood) - expected) < 1e-3


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
# As people use it


@pytest.mark.parametrize("window, refuses", [(N, True), ("left out", True), (None, False), (16 * N, False)])
def test_a_sliding_window_is_refused_where_it_would_act(tmp_path, refused, window, refuses):
    folder = tmp_path / "mistral"
    options = LLAMA | dict(num_key_value_heads=2, max_position_embeddings=512 if window == "left out" else N)
    config = transformers.MistralConfig(**options, sliding_window=4096 if window == "left out" else window)
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    convert.byte_level_bpe(tokenizer.get_tokenizer("bytes"), folder)
    if window == "left out":
        edit(folder, sliding_window=None)
    if refuses:
        assert "sliding window" in refused(convert.main, "from", folder, tmp_path / "run")
    else:
        assert_same_logits(*imported(folder, tmp_path / "run"), length=8 * N)


def test_what_belongs_to_a_tokenizer_comes_out_as_it_went_in(tmp_path, monkeypatch, capsys):
    """BOS, padding, a chat template in a file of its own, several EOS; also after training, and in a moved run."""
    ids = {"bos_token_id": 257, "eos_token_id": [256, 10], "pad_token_id": 257}
    make_llama(tmp_path / "llama", vocab_size=258, **ids)
    (tmp_path / "llama/generation_config.json").write_text(json.dumps(ids | {"temperature": 0.5, "do_sample": True}))
    (tmp_path / "llama/chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    bpe = Tokenizer.from_file(str(tmp_path / "llama/tokenizer.json"))
    bpe.add_special_tokens(["<s>"])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    bpe.save(str(tmp_path / "llama/tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": tokenizer.END, "pad_token": "<s>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "llama/tokenizer_config.json").write_text(json.dumps(config))

    convert.main(["from", str(tmp_path / "llama"), str(tmp_path / "run")])
    (tmp_path / "text.txt").write_text("hello world " * 300)
    prepare.main([f"{tmp_path}/text.txt", f"--tokenizer={tmp_path}/run/tokenizer.json", f"--out={tmp_path}/data"])
    tokens = np.fromfile(tmp_path / "data/train.bin", np.uint16)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert tokens[:12].tolist() == theirs("hello world")["input_ids"] and tokens[0] == 257  # BOS begins a document
    ours = tokenizer.get_tokenizer(load_model(tmp_path / "run")[1]["tokenizer"], tmp_path / "run")
    document, n = passkey_document(ours, 400, 12345, 0.3)
    assert document == theirs(theirs.decode(document[1:]))["input_ids"] and n == 6
    begun, real = [], GPT.generate
    monkeypatch.setattr(GPT, "generate", lambda self, x, *more, **o: begun.append(x) or real(self, x, *more, **o))
    sample.main([f"{tmp_path}/run", "hello world", "--tokens=0", "--device=cpu"])
    assert begun[0].tolist() == [theirs("hello world")["input_ids"]]
    assert capsys.readouterr().out.endswith("\nhello world\n")
    argv = f"--init_from={tmp_path}/run --pos=fope --data={tmp_path}/data --out={tmp_path}/fope --train_len=32".split()
    argv += "--batch_tokens=64 --steps=1 --warmup=0 --eval_tokens=32 --eval_trials=0 --compile=off --device=cpu".split()
    train.train(train.parse_flags(argv))
    shutil.rmtree(tmp_path / "data")
    shutil.move(tmp_path / "fope", tmp_path / "moved")
    for run in ("run", "moved"):
        folder = tmp_path / f"{run}-hf"
        convert.main(["to", str(tmp_path / run), str(folder)])
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (folder / name).read_bytes() == (tmp_path / "llama" / name).read_bytes()
        again = transformers.AutoTokenizer.from_pretrained(folder)
        assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"
        config = json.loads((folder / "config.json").read_text())
        generation = json.loads((folder / "generation_config.json").read_text())
        assert all(config[name] == generation[name] == value for name, value in ids.items())
        assert generation["temperature"] == 0.5


def test_an_exported_fope_decodes_with_a_static_cache_compiled(tmp_path):
    ours, folder = exported(tmp_path, n_kv_head=2)
    theirs, prompt = load(folder), text(2, 20)
    theirs.forward = torch.compile(theirs.forward, backend="eager", fullgraph=True)
    options = dict(max_new_tokens=N, do_sample=False, pad_token_id=256, eos_token_id=None)
    written = theirs.generate(prompt, cache_implementation="static", **options)
    assert torch.equal(written, ours.generate(prompt, N))


def test_an_exported_fope_is_never_taken_for_a_plain_llama(tmp_path):
    ours, folder = exported(tmp_path, tied=True)
    with pytest.raises(KeyError, match="fope"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    theirs = load(folder)
    theirs.save_pretrained(tmp_path / "again")  # as after fine-tuning there
    with pytest.raises(KeyError, match="fope"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=False)
    assert_same_logits(ours, load(tmp_path / "again"))
    assert not theirs.config.base_model_tp_plan  # a rank's heads would not fit the coefficients
    hidden = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)(text(1, 9)).last_hidden_state
    torch.testing.assert_close(theirs.lm_head(hidden), theirs(text(1, 9)).logits, rtol=0, atol=1e-5)


def test_the_tokenizer_of_an_exported_fope_asks_for_nothing(tmp_path, monkeypatch):
    _, folder = exported(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asks whether to run code"))
    assert transformers.AutoTokenizer.from_pretrained(folder)("abc")["input_ids"] == [97, 98, 99]


def environment(folder, *packages):
    """An environment of its own that shares torch with this one. Returns its Python."""
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", "--no-deps", *packages], check=True)
    return folder / "bin/python"


@pytest.mark.slow
def test_transformers_4_agrees_or_refuses(tmp_path):
    packages = ["transformers==4.57.6", "huggingface_hub<1.0", "tokenizers>=0.22,<=0.23.0"]
    python = environment(tmp_path / "env", *packages)
    code = """import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=len(sys.argv) > 2)
torch.save(model(torch.load("tokens.pt")).logits.detach(), "logits.pt")"""
    torch.save(text(1, 4 * N), tmp_path / "tokens.pt")
    yarn = dict(scaling="yarn", scale=4.0, original_len=16, logit_scale=1.3)
    cases = [dict(pos="rope", theta=1e5), dict(pos="rope", theta=1e5, **yarn), dict(pos="rope", scaling="linear")]
    for i, options in enumerate([*cases, dict(fourier_series=False, zero_phase=True), {}, {}]):
        ours, folder = exported(tmp_path / str(i), **options)
        command = [python, "-c", code, folder, *["trust"] * (i == 5)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        if i < len(cases):
            assert done.returncode == 0, done.stderr
            with torch.no_grad():
                torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours(text(1, 4 * N)), atol=1e-5, rtol=0)
        else:
            words = ["KeyError: 'proportional'", "KeyError: 'fope'", "needs transformers 5.5 or newer"][i - len(cases)]
            assert done.returncode == 1 and words in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_pip_installs_fope_alone(tmp_path):
    for name in ("fope.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(convert.ROOT / name, tmp_path)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "dist", tmp_path]
    subprocess.run(build, check=True)
    (wheel,) = (tmp_path / "dist").glob("fope-*.whl")
    assert sorted(name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name) == ["fope.py"]
    python = environment(tmp_path / "env", wheel)
    code = "import fope; print(fope.FoPE(n_head=2, head_dim=16, train_len=64, seed=0), fope.__file__)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path / "env", capture_output=True, text=True, check=True)
    assert done.stdout.startswith("FoPE()") and str(tmp_path / "env") in done.stdout
