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
from huggingface_hub.errors import StrictDataclassError

from common import Parser, UserError, command, say
from data.tokenizer import END, GPT2_PATTERN, JsonTokenizer, copy_tokenizer, get_tokenizer
from model import FOPE_OPTIONS, GPT, GPTConfig, frequencies, load_model, position_seed

try:
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, logging
    from transformers.convert_slow_tokenizer import TikTokenConverter
except ImportError as error:
    raise SystemExit(f"hf.convert needs more packages ({error}): pip install 'transformers>=5.5'") from None

ROOT = Path(__file__).resolve().parent.parent


def llama_names(cfg: GPTConfig) -> dict[str, list[str]]:
    """Maps each of our weights to the weights of a Llama whose rows it holds."""
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
    """Our weights, or their gradients, cut into those of a Llama."""
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


def read_config(config, tied: bool) -> GPTConfig:
    """The model that a config of transformers describes. Raises a UserError that names what our GPT lacks."""
    architecture = (config.architectures or ["an unknown architecture"])[0]
    if architecture not in ("LlamaForCausalLM", "MistralForCausalLM"):
        raise UserError(f"our GPT cannot represent {architecture}, only LlamaForCausalLM and MistralForCausalLM")
    N, rope = config.max_position_embeddings, config.rope_parameters
    kind, window = rope["rope_type"], getattr(config, "sliding_window", None)
    constants = {"low_freq_factor": 1, "high_freq_factor": 4, "beta_fast": 32, "beta_slow": 1, "truncate": True}
    unfit = {
        "biases": getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False),
        f"a sliding window of {window}, which acts below 16 N": window is not None and window < 16 * N,
        "partial rotation": rope.get("partial_rotary_factor", 1) != 1,
        "experts": getattr(config, "num_local_experts", None),
        "quantized weights": getattr(config, "quantization_config", None),
        f"the activation {config.hidden_act}": config.hidden_act != "silu",
        f"rope_type {kind}": kind not in ("default", "linear", "llama3", "yarn"),
        f"{kind} with other constants": any(rope.get(name) not in (None, x) for name, x in constants.items()),
    }
    if found := [name for name, is_so in unfit.items() if is_so]:
        raise UserError(f"our GPT cannot represent {' and '.join(found)}")
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
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_kv_head=config.num_key_value_heads,
        head_dim=config.head_dim,
        n_embd=config.hidden_size,
        n_hidden=config.intermediate_size,
        vocab_size=config.vocab_size,
        tied=tied,
        norm_eps=config.rms_norm_eps,
        train_len=N,
        pos="rope",
        theta=float(rope["rope_theta"]),
        **scaling,
    )


def from_hf(folder: Path, work: Path, out: Path) -> None:
    """Write ckpt.pt and the tokenizer to the folder `work`, which becomes `out`. Raises UserError.

    transformers reads the config and the weights: defaults, older spellings, shards, which file wins, what is tied.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UserError(f"there is no {folder / name}: name the folder of a Hugging Face model")

    def load(auto, **options):
        try:
            return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        except (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError) as error:
            raise UserError(f"transformers cannot load {folder}: {str(error)[:300]}") from error

    config = load(AutoConfig)
    read_config(config, tied=False)  # refuse what does not fit before the weights are read
    options = dict(dtype=torch.float32, use_safetensors=True)  # a pickle can run code
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # what does not fit is named below
    theirs, info = load(AutoModelForCausalLM, config=config, **options)
    unlike = sorted(name if isinstance(name, str) else name[0] for names in info.values() for name in names)
    if unlike:
        raise UserError(f"{folder} does not have the weights of its config.json: {', '.join(unlike[:3])}")
    cfg = read_config(config, tied=theirs.lm_head.weight is theirs.model.embed_tokens.weight)
    tokenizer, weights = JsonTokenizer(folder / "tokenizer.json", None), theirs.state_dict()
    model = GPT(cfg)
    with torch.no_grad():
        for name, ours in model.named_parameters():
            ours.copy_(torch.cat([weights[other] for other in llama_names(cfg)[name]]))
    theirs.generation_config.save_pretrained(work)  # the ids of BOS, EOS and padding
    copy_tokenizer(folder, work)
    facts = {"step": 0, "tokenizer": tokenizer.name, "config": asdict(cfg) | {"data": str(out)}}
    torch.save(facts | {"model": model.state_dict()}, work / "ckpt.pt")


# ----------------------------------------------------------------------------------------------------------------------
# To a Hugging Face folder


def rope_parameters(model: GPT) -> dict | None:
    """The entry of config.json that makes a plain Llama compute the model's position embedding, or None."""
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
    """config.fope of modeling_fope.py. The frequencies are written out, not derived from other fields."""
    names = ("pos", "logn", "logit_scale", *(FOPE_OPTIONS if cfg.pos == "fope" else ("train_len",)))
    facts = {"seed": position_seed(cfg, 0), "omega": frequencies(cfg).tolist()}  # modeling_fope.py adds the layer
    return {name: getattr(cfg, name) for name in names} | facts


def byte_level_bpe(tokenizer, folder: Path) -> None:
    """Write tiktoken's ranks as tokenizer.json and tokenizer_config.json."""
    pattern = GPT2_PATTERN.replace("++", "+").replace("$", r"\z")  # there, $ is the end of a line
    converter = TikTokenConverter(pattern=pattern, extra_special_tokens=[END])
    converter.load_tiktoken_bpe = lambda file: tokenizer.encoding._mergeable_ranks  # instead of a file's
    converter.converted().save(str(folder / "tokenizer.json"))
    config = {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def to_hf(run: Path, work: Path, dtype: str) -> None:
    """Write to the folder `work` what AutoModelForCausalLM.from_pretrained loads. Raises UserError."""
    model, checkpoint = load_model(run)
    cfg = model.cfg
    if cfg.pos not in ("rope", "fope") or cfg.qk_norm:
        what = "QK-norm" if cfg.qk_norm else cfg.pos
        raise UserError(f"a model with {what} cannot be exported: only rope and fope without QK-norm can")
    tokenizer = get_tokenizer(checkpoint["tokenizer"], checkpoint["folder"], checkpoint["config"]["data"])
    rope, ids = rope_parameters(model), {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    kept = Path(checkpoint["folder"]) / "generation_config.json"  # of an imported model
    generation = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else ids
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": cfg.n_embd,
        "intermediate_size": cfg.n_hidden,
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.d,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.train_len,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "hidden_act": "silu",
        "dtype": dtype,
        **{name: value for name, value in generation.items() if name.endswith("_token_id")},
        "rope_parameters": rope or {"rope_type": "fope"},  # which a plain Llama refuses
        "rope_scaling": rope or {"rope_type": "fope"},  # what version 4 of transformers reads
        "rope_theta": cfg.theta,
    }
    state = model.state_dict()
    weights = in_llama_names(cfg, {name: x.to(getattr(torch, dtype)) for name, x in state.items()})
    if rope is None:
        names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
        config |= {"architectures": ["FopeLlamaForCausalLM"], "fope": fope_options(cfg)}
        config["auto_map"] = {auto: f"modeling_fope.FopeLlama{name}" for auto, name in names.items()}
        coefs = {name: x for name, x in state.items() if name.endswith(".position.coef")}
        weights |= {f"model.layers.{name.split('.')[1]}.self_attn.position.coef": x for name, x in coefs.items()}
        for file in ("hf/modeling_fope.py", "fope.py"):
            shutil.copy(ROOT / file, work)
    save_file({name: x.contiguous() for name, x in weights.items()}, work / "model.safetensors", {"format": "pt"})
    (work / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (work / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    if tokenizer.name.startswith("json-"):
        copy_tokenizer(checkpoint["folder"], work)
    else:
        byte_level_bpe(tokenizer, work)


@command
def main(argv: list[str]) -> None:
    parser = Parser(__doc__, prog="hf.convert")
    parser.add_argument("direction", choices=("from", "to"), help="from: import a model; to: export a run")
    parser.add_argument("source", type=Path, help="from: a Hugging Face folder; to: a run folder of train.py")
    parser.add_argument("target", type=Path, help="the folder to write, which must not exist")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="to: dtype of the weights")
    args = parser.parse_args(argv)
    if args.target.exists():
        raise UserError(f"{args.target} exists: name another folder")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
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
