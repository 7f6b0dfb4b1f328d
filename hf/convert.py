"""Llama-family models in, Hugging Face folders out.

    python -m hf.convert from SmolLM2-135M out/smollm       a checkpoint for train.py, eval_passkey.py and sample.py
    python -m hf.convert to out/smollm-fope-s0 my-model     a folder for AutoModelForCausalLM.from_pretrained

Our GPT computes what LlamaForCausalLM computes. Both pair dimension m with m + head_dim / 2. Only names differ, and q,
k and v are rows of one matrix here, as are gate and up.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from common import say
from data.files import fail
from data.tokenizer import END, GPT2_PATTERN, JsonTokenizer, get_tokenizer
from model import FOPE_OPTIONS, GPT, GPTConfig, frequencies, load_model, position_seed

try:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
except ImportError as error:
    fail(f"hf.convert needs the package {error.name}: pip install safetensors tokenizers")

ROOT = Path(__file__).resolve().parent.parent


def llama_names(cfg: GPTConfig) -> dict[str, list[str]]:
    """Each of our weights, and the weights of a Llama whose rows it holds."""
    names = {"embedding": ["model.embed_tokens"], "norm": ["model.norm"]}
    if not cfg.tied:
        names["head"] = ["lm_head"]
    for i in range(cfg.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        names[f"{ours}.norm1"] = [f"{theirs}.input_layernorm"]
        names[f"{ours}.attention.qkv"] = [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]
        names[f"{ours}.attention.out"] = [f"{theirs}.self_attn.o_proj"]
        names[f"{ours}.norm2"] = [f"{theirs}.post_attention_layernorm"]
        names[f"{ours}.mlp.gate_up"] = [f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj"]
        names[f"{ours}.mlp.down"] = [f"{theirs}.mlp.down_proj"]
    return {f"{ours}.weight": [f"{name}.weight" for name in theirs] for ours, theirs in names.items()}


def in_llama_names(cfg: GPTConfig, ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights, or their gradients, cut into the rows of a Llama's."""
    weights = {}
    for name, theirs in llama_names(cfg).items():
        rows = [len(ours[name]) // len(theirs)] * len(theirs)
        if len(theirs) == 3:  # q, k, v
            rows = [heads * cfg.d for heads in (cfg.n_head, cfg.kv_heads, cfg.kv_heads)]
        weights |= zip(theirs, ours[name].split(rows))
    return weights


def intern_s1_coefficients(cos_coef: torch.Tensor, sin_coef: torch.Tensor) -> torch.Tensor:
    """FoPE.coef (2, n_kv_head, D, M) from the tensors (n_kv_head, D, M) of Intern-S1-Pro, which contain the identity.

    Use it with zero_phase=False: that model was trained with sine 1 for its clipped pairs.
    """
    return torch.stack([cos_coef, sin_coef]).float() - torch.eye(*cos_coef.shape[-2:])


# ----------------------------------------------------------------------------------------------------------------------
# From a Hugging Face folder


def read_config(config: dict) -> GPTConfig:
    """The model that a config.json describes. Raises ValueError that names what our GPT does not have."""
    N, heads, width = config["max_position_embeddings"], config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # the second is the older spelling
    kind = rope.get("rope_type", rope.get("type", "default"))
    d, act = config.get("head_dim") or width // heads, config.get("hidden_act", "silu")
    architecture = (config.get("architectures") or ["an unknown architecture"])[0]
    partial = ({"partial_rotary_factor": 1.0} | config | rope)["partial_rotary_factor"]
    constants = {"low_freq_factor": 1, "high_freq_factor": 4, "beta_fast": 32, "beta_slow": 1, "truncate": True}
    unfit = {
        architecture: architecture not in ("LlamaForCausalLM", "MistralForCausalLM"),
        "biases": config.get("attention_bias") or config.get("mlp_bias"),
        f"a sliding window of {config.get('sliding_window')}": (config.get("sliding_window") or N) < N,
        "partial rotation": partial != 1,
        "experts": config.get("num_local_experts"),
        "quantized weights": config.get("quantization_config"),
        f"the activation {act}": act != "silu",
        f"head_dim {d}, which is not hidden_size / num_attention_heads": d * heads != width,
        f"rope_type {kind}": kind not in ("default", "linear", "llama3", "yarn"),
        f"{kind} with other constants": any(rope.get(name) not in (None, x) for name, x in constants.items()),
    }
    if found := [name for name, is_so in unfit.items() if is_so]:
        raise ValueError(f"model.py has no form for {' and '.join(found)}")
    scaling = {}
    if kind != "default":
        original = rope.get("original_max_position_embeddings") or N
        scaling = dict(scaling=kind, scale=float(rope.get("factor") or N / original), original_len=original)
    if kind == "yarn":  # transformers multiplies cos and sin of both q and k, so the logit gains the square
        log = 0.1 * math.log(max(scaling["scale"], 1))
        m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
        temperature = (m * log + 1) / (m_all * log + 1) if m and m_all else log + 1
        scaling["logit_scale"] = (rope.get("attention_factor") or temperature) ** 2
    return GPTConfig(
        n_layer=config["num_hidden_layers"],
        n_head=heads,
        n_kv_head=config.get("num_key_value_heads") or heads,
        n_embd=width,
        n_hidden=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        train_len=N,
        pos="rope",
        theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        **scaling,
    )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}. Only safetensors are read: a pickle (.bin) can run code")
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def from_hf(folder: Path, work: Path, out: Path) -> None:
    """Write to the folder `work` what the folder `out` will hold: ckpt.pt and the tokenizer. Raises ValueError."""
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it needs config.json and tokenizer.json")
    cfg = read_config(json.loads((folder / "config.json").read_text()))
    tokenizer = JsonTokenizer(folder / "tokenizer.json", None)
    weights, names = read_weights(folder), llama_names(cfg)
    expected = {name for theirs in names.values() for name in theirs}
    ignored = {"lm_head.weight"} if cfg.tied else set()  # a tied model may store it too
    unlike = expected ^ (weights.keys() - ignored - {name for name in weights if name.endswith("inv_freq")})
    if unlike:
        raise ValueError(f"{folder} does not have the weights of its config.json: {', '.join(sorted(unlike)[:3])}")
    state = {ours: torch.cat([weights[name].float() for name in theirs]) for ours, theirs in names.items()}
    if cfg.tied:
        state["head.weight"] = state["embedding.weight"]
    model = GPT(cfg)
    model.load_state_dict(state)
    for name, content in tokenizer.files.items():
        (work / name).write_bytes(content)
    facts = {"step": 0, "tokenizer": tokenizer.name, "config": asdict(cfg) | {"data": str(out)}}
    torch.save(facts | {"model": model.state_dict()}, work / "ckpt.pt")


# ----------------------------------------------------------------------------------------------------------------------
# To a Hugging Face folder


def rope_parameters(model: GPT) -> dict | None:
    """The entry of config.json that makes a plain Llama compute the model's position embedding. None: there is none."""
    cfg, position = model.cfg, model.blocks[0].attention.position
    has_series = getattr(position, "coef", None) is not None
    if has_series or cfg.logn or cfg.whole_cycles or (cfg.logit_scale != 1 and cfg.scaling != "yarn"):
        return None
    M, base = len(position.omega), {"rope_type": "default", "rope_theta": cfg.theta}
    if cfg.pos == "fope" and M < cfg.d // 2:
        if position.n_ones or cfg.scaling != "none":
            return None
        # transformers rotates the first int(factor * head_dim // 2) pairs. The 0.5 keeps this at M despite rounding
        return base | {"rope_type": "proportional", "partial_rotary_factor": (2 * M + 0.5) / cfg.d}
    if cfg.scaling == "none":
        return base
    scaling = base | {"rope_type": cfg.scaling, "factor": cfg.scale}
    if cfg.scaling != "linear":
        scaling["original_max_position_embeddings"] = cfg.original_len
    if cfg.scaling == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if cfg.scaling == "yarn":
        scaling["attention_factor"] = cfg.logit_scale**0.5
    return scaling


def fope_options(cfg: GPTConfig) -> dict:
    """config.fope of modeling_fope.py. The frequencies are written out: nothing follows from other fields."""
    names = ("pos", "logn", "logit_scale", *(FOPE_OPTIONS if cfg.pos == "fope" else ("train_len",)))
    facts = {"seed": position_seed(cfg, 0), "omega": frequencies(cfg).tolist()}  # modeling_fope.py adds the layer
    return {name: getattr(cfg, name) for name in names} | facts


def tokenizer_files(tokenizer) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json for transformers. tiktoken's ranks become a byte-level BPE."""
    files = {name: content for name, content in tokenizer.files.items() if name.endswith(".json")}
    if not files:
        ranks = tokenizer.encoding._mergeable_ranks
        # Byte-level BPE writes each byte as a printable character, in the order that GPT-2 chose.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        spell = {token: "".join(letters[b] for b in token) for token in ranks}
        merges = []
        for token in sorted(ranks, key=ranks.get):
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:  # merge as BPE does, up to the last merge, which makes the token
                at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            if len(parts) == 2:
                merges.append((spell[parts[0]], spell[parts[1]]))
        bpe = Tokenizer(models.BPE(vocab={spell[token]: rank for token, rank in ranks.items()}, merges=merges))
        pattern = GPT2_PATTERN.replace("++", "+").replace("$", r"\z")  # there, $ is the end of a line
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens([AddedToken(END, special=True)])
        files = {
            "tokenizer.json": bpe.to_str().encode(),
            "tokenizer_config.json": json.dumps({"eos_token": END}).encode(),
        }
    config = json.loads(files["tokenizer_config.json"]) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return files | {"tokenizer_config.json": json.dumps(config, indent=1).encode()}


def to_hf(run: Path, work: Path, dtype: str) -> None:
    """Write to the folder `work` what AutoModelForCausalLM.from_pretrained loads. Raises ValueError."""
    model, checkpoint = load_model(run)
    cfg = model.cfg
    if cfg.pos not in ("rope", "fope") or cfg.qk_norm:
        what = "QK-norm" if cfg.qk_norm else cfg.pos
        raise ValueError(f"a model with {what} has no form in transformers: only rope and fope without QK-norm have")
    tokenizer = get_tokenizer(checkpoint["tokenizer"], checkpoint["config"]["data"])
    rope = rope_parameters(model)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": cfg.n_embd,
        "intermediate_size": cfg.n_hidden,
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.kv_heads,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.train_len,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "hidden_act": "silu",
        "dtype": dtype,
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot,
        "rope_parameters": rope or {"rope_type": "default", "rope_theta": cfg.theta},
    }
    state = model.state_dict()
    weights = in_llama_names(cfg, {name: x.to(getattr(torch, dtype)) for name, x in state.items()})
    if rope is None:
        classes = {"AutoConfig": "FopeLlamaConfig", "AutoModelForCausalLM": "FopeLlamaForCausalLM"}
        config |= {"architectures": ["FopeLlamaForCausalLM"], "model_type": "fope_llama", "fope": fope_options(cfg)}
        config["auto_map"] = {auto: f"modeling_fope.{name}" for auto, name in classes.items()}
        coefs = {name: x for name, x in state.items() if name.endswith(".position.coef")}
        weights |= {f"model.layers.{name.split('.')[1]}.self_attn.position.coef": x for name, x in coefs.items()}
        for file in ("hf/modeling_fope.py", "fope.py"):
            shutil.copy(ROOT / file, work)
    save_file({name: x.contiguous() for name, x in weights.items()}, work / "model.safetensors", {"format": "pt"})
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    (work / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (work / "generation_config.json").write_text(json.dumps(ids, indent=1) + "\n")
    for name, content in tokenizer_files(tokenizer).items():
        (work / name).write_bytes(content)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf.convert", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("direction", choices=("from", "to"))
    parser.add_argument("source", type=Path, help="from: a Hugging Face folder; to: a run folder of train.py")
    parser.add_argument("target", type=Path, help="the folder to write, which must not exist")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="to: of the weights")
    args = parser.parse_args(argv)
    if args.target.exists():
        fail(f"{args.target} exists: name another folder")
    try:
        args.target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.target.parent) as temporary:
            work = Path(temporary) / "folder"  # complete before it gets its name
            work.mkdir()
            if args.direction == "from":
                from_hf(args.source, work, args.target)
            else:
                to_hf(args.source, work, args.dtype)
            work.rename(args.target)
    except (KeyError, TypeError, AttributeError) as error:
        fail(f"{args.source}/config.json is damaged: {error!r}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        fail(str(error))
    say(f"written: {args.target}")


if __name__ == "__main__":
    main(sys.argv[1:])
