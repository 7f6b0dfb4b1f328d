"""What trained models do: the size of q and k, the attention on a passkey, the loss at each position.

    python paper/measure.py qk out/tiny-rope-s0 out/tiny-fope-s0           -> paper/results/qk_means.json
    python paper/measure.py attention out/tiny-rope-s* out/tiny-fope-s*    -> paper/results/attention.json
    python paper/measure.py loss out/smollm out/smollm-fope --data=data/essay --length=16384
                                                                           -> paper/results/loss_by_position.json

figures.py draws what the first two files hold.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import Parser, command, find_device, replace_file, say
from data.read import load
from data.tokenizer import get_tokenizer
from eval_passkey import passkey_trials
from model import GPT, load_model

RESULTS = ROOT / "paper/results"


def mean_qk(model: GPT, checkpoint: dict) -> dict:
    """Mean |q| and |k| before rotation, by layer, head and dimension, over 64 validation sequences."""
    N, seen = model.cfg.train_len, []  # (q, k) of each layer, each (n_head, head_dim)
    tokens, _ = load(checkpoint["config"]["data"], "val")
    hooks = [
        block.attention.position.register_forward_pre_hook(
            lambda module, args: seen.append([x.abs().mean((0, 2)) for x in args[:2]])
        )
        for block in model.blocks
    ]
    model(torch.from_numpy(tokens[: 64 * N].astype(np.int64)).view(64, N).to(model.head.weight.device))
    for hook in hooks:
        hook.remove()
    return {name: np.round([layer[i].tolist() for layer in seen], 3).tolist() for i, name in enumerate("qk")}


def attention_on_key(model: GPT, checkpoint: dict, trials: int = 10) -> list[dict]:
    """How the queries that must name a digit of the key attend to the key's digits: numbers by layer and head.

    share: the part of attention on the digits. near: the part on the 16 latest tokens. lead: the digits' mean logit,
    weighted by attention, minus the plain mean over all other tokens. gap: the same, minus the other tokens' mean
    weighted by attention. A row has one length and p of log-n scaling in each layer: 0, 1 or 2 in all and, at 4N,
    2 in all but the last layer or in the last alone. right: the share of keys that the model names.
    """
    cfg, N, seen, p_of = model.cfg, model.cfg.train_len, [], {}
    tokenizer = get_tokenizer(checkpoint["tokenizer"], checkpoint["folder"], checkpoint["config"]["data"])
    hooks = []
    for block in model.blocks:
        hooks += [
            block.attention.position.register_forward_hook(lambda module, args, out: seen.append((module, *out))),
            block.register_forward_pre_hook(lambda block, args: (*args[:2], p_of[block], *args[3:])),
        ]
    last, rows = len(model.blocks) - 1, []
    for length in (N * m for m in (1, 2, 4, 8, 16)):
        settings = [[p] * (last + 1) for p in (0.0, 1.0, 2.0)[: 3 if length > N else 1]]
        if length == 4 * N:
            settings += [[2.0] * last + [0.0], [0.0] * last + [2.0]]
        documents, _, _ = passkey_trials(tokenizer, length, trials, 0)
        for p in settings:
            p_of.update(zip(model.blocks, p))
            found, right = [], 0
            for document in documents:
                seen.clear()
                tokens = torch.from_numpy(document[None].astype(np.int64)).to(model.head.weight.device)
                right += (model(tokens[:, :-1], last=5).argmax(-1) == tokens[:, -5:]).all().item()
                text = bytes(document.astype(np.uint8))
                key = text[-5:]
                first = text.index(key)
                places = [first, text.index(key, first + 5)]  # the information line names the key twice
                digits = torch.tensor([place + i for place in places for i in range(5)])
                found.append([head_numbers(*layer, digits, cfg.d) for layer in seen])
            numbers = np.array(found).mean(0).transpose(1, 0, 2).round(4).tolist()  # (n_layer, n_head) each
            names = dict(zip(("share", "near", "lead", "gap"), numbers))
            rows.append({"length": length, "p": p, "right": right / trials} | names)
    for hook in hooks:
        hook.remove()
    return rows


def head_numbers(position, q: torch.Tensor, k: torch.Tensor, digits: torch.Tensor, head_dim: int) -> list:
    """share, near, lead and gap of each head in one document. q, k (1, n_head, T, d) are rotated; digits (10,)."""
    T = k.shape[-2]
    i, j = torch.arange(T - 5, T, device=q.device)[:, None], torch.arange(T, device=q.device)  # five queries, all keys
    logits = (q[0, :, -5:] @ k[0].mT) / head_dim**0.5  # (n_head, 5, T)
    if hasattr(position, "bias"):
        logits = logits + position.bias(i, j)
    weights = logits.masked_fill(j > i, -torch.inf).softmax(-1)
    share, near = weights[..., digits].sum(-1), (weights * (i - j < 16)).sum(-1)
    other = torch.ones(T, dtype=torch.bool, device=q.device)
    other[digits], other[-4:] = False, False  # the last four keys are visible to some of the queries only
    own, others = logits[..., digits], logits[..., other]
    own = (own.softmax(-1) * own).sum(-1)  # (n_head, 5)
    gap = own - (others.softmax(-1) * others).sum(-1)
    return [x.mean(-1).tolist() for x in (share, near, own - others.mean(-1), gap)]


def reading_head(rows: list[dict], N: int) -> str:
    """The head with the largest share at N, and the p that keeps this share beyond N, to first order.

    Multiplying all logits by s changes the share's log odds by (s - 1) gap, and n keys instead of N change them by
    -log(n / N). Both cancel for s - 1 = log(n / N) / gap, that is, near N, for (log n / log N)^p with p = log N / gap.
    """
    shares = np.array(rows[0]["share"])
    layer, head = np.unravel_index(shares.argmax(), shares.shape)
    share, lead, gap = (rows[0][name][layer][head] for name in ("share", "lead", "gap"))
    p = math.log(N) / gap
    return f"layer {layer}, head {head}: share {share:.2f}, lead {lead:.2f}, gap {gap:.2f}, p = log N / gap = {p:.2f}"


def loss_by_position(model: GPT, data: str, split: str, length: int, windows: int, bins: int = 16) -> list[float]:
    """Mean loss in nats in each of `bins` equal pieces of `length` tokens, over the first `windows` texts."""
    tokens, _ = load(data, split)
    device, hidden = model.head.weight.device, []
    total = torch.zeros(length, device=device)
    hook = model.norm.register_forward_hook(lambda module, args, out: hidden.append(out[0]))
    for i in range(windows):
        both = torch.from_numpy(tokens[i * length : (i + 1) * length + 1].astype(np.int64)).to(device)
        hidden.clear()
        model(both[None, :-1], last=1)
        pieces = zip(hidden[0].split(256), both[1:].split(256))  # the logits of all tokens would take gigabytes
        total += torch.cat([F.cross_entropy(model.head(x), y, reduction="none") for x, y in pieces])
    hook.remove()
    return [round(x, 4) for x in (total / windows).view(bins, -1).mean(-1).tolist()]


@command
@torch.no_grad()
def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("qk", "attention", "loss"), help="what to measure")
    parser.add_argument("runs", nargs="+", type=Path, help="folders that train.py or hf.convert wrote")
    parser.add_argument("--data", help="loss: folder with the text (default: each run's own data)")
    parser.add_argument("--split", default="val", choices=("train", "val"), help="loss: split to use (default: val)")
    parser.add_argument("--length", type=int, default=16_384, help="loss: tokens in a text (default: 16384)")
    parser.add_argument("--windows", type=int, default=2, help="loss: how many texts of that length (default: 2)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    file = RESULTS / {"qk": "qk_means.json", "attention": "attention.json", "loss": "loss_by_position.json"}[args.what]
    # A run that is measured again replaces its own results.
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    device, _, _ = find_device(args.device)
    for run in args.runs:
        model, checkpoint = load_model(run)
        cfg, data = model.to(device).cfg, args.data or checkpoint["config"]["data"]
        found = {"pos": cfg.pos, "step": checkpoint["step"], "seed": cfg.seed, "train_len": cfg.train_len}
        if args.what == "qk":
            found |= mean_qk(model, checkpoint)
        elif args.what == "attention":
            found |= {"rows": attention_on_key(model, checkpoint)}
            say(reading_head(found["rows"], cfg.train_len))
        else:
            found |= {"data": data, "length": args.length, "windows": args.windows}
            found |= {"loss": loss_by_position(model, data, args.split, args.length, args.windows)}
        results[run.name] = found
        replace_file(file, lambda f: f.write(json.dumps(results).encode() + b"\n"))
        say(f"written: {run} in {file}")


if __name__ == "__main__":
    main()
