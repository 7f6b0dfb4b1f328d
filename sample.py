"""Continue a text with a trained model.

python sample.py out/tiny-fope-s0 "def main("
"""

import argparse
import math
import sys

import torch

from data.files import fail, say
from data.tokenizer import get_tokenizer
from model import find_device, load_model


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Continue a text with a trained model.", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("checkpoint", help="folder or file that train.py wrote")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="how many tokens to add (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default 0.8)")
    parser.add_argument("--top_k", type=int, default=0, help="sample from the k most likely tokens; 0 is all (default)")
    parser.add_argument("--logn", type=float, help="p of (log n / log N)^p on q beyond N (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, default=0, help="another seed samples another text (default 0)")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, mps or cpu")
    args = parser.parse_args(argv)
    try:
        model, checkpoint = load_model(args.checkpoint)
        device, _, autocast = find_device(args.device)
        tokenizer = get_tokenizer(checkpoint["tokenizer"], checkpoint["config"]["data"])
        prompt = tokenizer.encode_ordinary(args.prompt)
        if not prompt or args.tokens < 0:
            raise ValueError("the prompt needs at least one character, and --tokens must be 0 or more")
        tokens = torch.tensor([prompt], device=device)
        model.cfg.logn = model.cfg.logn if args.logn is None else args.logn
        if not 0 <= model.cfg.logn < math.inf:
            raise ValueError(f"--logn {args.logn} must be 0 or more")
        options = dict(temperature=args.temperature, top_k=args.top_k, seed=args.seed)
        with autocast():
            tokens = model.to(device).generate(tokens, args.tokens, **options)[0].tolist()
    except ValueError as error:
        fail(str(error))
    text = tokenizer.decode([t for t in tokens if t < tokenizer.n_vocab])  # the vocabulary is padded
    say(text)


if __name__ == "__main__":
    main(sys.argv[1:])
