"""Llama-family models in, Hugging Face folders out.

    python -m hf.convert from SmolLM2-135M out/smollm       a checkpoint for train.py, eval_passkey.py and sample.py
    python -m hf.convert to out/smollm-fope-s0 my-model     a folder for AutoModelForCausalLM.from_pretrained

Our GPT computes what LlamaForCausalLM computes. Both pair dimension m with m + head_dim / 2. Only names differ, and q,
k and v are rows of one matrix here, as are gate and up.
"""

import json
import math
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from common import Parser, UserError, command, say
from data.tokenizer import END, GPT2_PATTERN, JsonTokenizer, get_tokenizer
from model import FOPE_OPTIONS, GPT, GPTConfig, frequencies, load_model, position_seed

try:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
except ImportError:
    raise SystemExit("hf.convert needs the package safetensors: pip install safetensors tokenizers") from None

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
    """The model that a config.json describes. Raises UserError that names what our GPT does not have."""
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
        raise UserError(f"model.py has no form for {' and '.join(found)}")
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


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"there is no {path}: name the folder of a Hugging Face model")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    index = folder / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}. Only safetensors are read: a pickle (.bin) can run code")
    try:
        return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    except SafetensorError as error:
        raise UserError(f"the weights in {folder} are damaged: {error}") from error


def from_hf(folder: Path, work: Path, out: Path) -> None:
    """Write to the folder `work` what the folder `out` will hold: ckpt.pt and the tokenizer. Raises UserError."""
    config = read_json(folder / "config.json")
    try:
        cfg = read_config(config)
    except KeyError as error:
        raise UserError(f"{folder}/config.json has no {error}") from error
    tokenizer = JsonTokenizer(folder / "tokenizer.json", None)
    weights, names = read_weights(folder), llama_names(cfg)
    expected = {name for theirs in names.values() for name in theirs}
    ignored = {"lm_head.weight"} if cfg.tied else set()  # a tied model may store it too
    unlike = expected ^ (weights.keys() - ignored - {name for name in weights if name.endswith("inv_freq")})
    if unlike:
        raise UserError(f"{folder} does not have the weights of its config.json: {', '.join(sorted(unlike)[:3])}")
    state = {ours: torch.cat([weights[name].float() for name in theirs]) for ours, theirs in names.items()}
    if cfg.tied:
        state["head.weight"] = state["embedding.weight"]
    model = GPT(cfg)
    for name, x in model.state_dict().items():
        if name in state and x.shape != state[name].shape:
            raise UserError(
                f"{folder} has weights of another shape than its config.json says: {', '.join(names[name])}"
            )
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
        from transformers.convert_slow_tokenizer import TikTokenConverter

        pattern = GPT2_PATTERN.replace("++", "+").replace("$", r"\z")  # there, $ is the end of a line
        converter = TikTokenConverter(pattern=pattern, extra_special_tokens=[END])
        converter.load_tiktoken_bpe = lambda file: tokenizer.encoding._mergeable_ranks  # instead of a file's
        files = {
            "tokenizer.json": converter.converted().to_str().encode(),
            "tokenizer_config.json": json.dumps({"eos_token": END}).encode(),
        }
    config = json.loads(files["tokenizer_config.json"]) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return files | {"tokenizer_config.json": json.dumps(config, indent=1).encode()}


def to_hf(run: Path, work: Path, dtype: str) -> None:
    """Write to the folder `work` what AutoModelForCausalLM.from_pretrained loads. Raises UserError."""
    model, checkpoint = load_model(run)
    cfg = model.cfg
    if cfg.pos not in ("rope", "fope") or cfg.qk_norm:
        what = "QK-norm" if cfg.qk_norm else cfg.pos
        raise UserError(f"a model with {what} cannot be exported: only rope and fope without QK-norm can")
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


@command
def main(argv: list[str]) -> None:
    parser = Parser(__doc__, prog="hf.convert")
    parser.add_argument("direction", choices=("from", "to"))
    parser.add_argument("source", type=Path, help="from: a Hugging Face folder; to: a run folder of train.py")
    parser.add_argument("target", type=Path, help="the folder to write, which must not exist")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="to: of the weights")
    args = parser.parse_args(argv)
    if args.target.exists():
        raise UserError(f"{args.target} exists: name another folder")
    args.target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.target.parent) as temporary:
        work = Path(temporary) / "folder"  # complete before it gets its name
        work.mkdir()
        if args.direction == "from":
            from_hf(args.source, work, args.target)
        else:
            to_hf(args.source, work, args.dtype)
        work.rename(args.target)
    say(f"written: {args.target}")


if __name__ == "__main__":
    main()
