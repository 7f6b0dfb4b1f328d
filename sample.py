"""Continue a text with a trained model.

python sample.py out/tiny-fope-s0 "def main("
"""

import torch

from common import Parser, UserError, at_least, command, find_device, say
from data.tokenizer import get_tokenizer
from model import load_model


@command
def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="folder or file that train.py wrote")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="how many tokens to add (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default 0.8)")
    parser.add_argument("--top_k", type=int, default=0, help="sample from the k most likely tokens; 0 is all (default)")
    parser.add_argument("--logn", type=float, help="exponent p of log-n scaling (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, default=0, help="a different seed samples a different text (default 0)")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, mps or cpu")
    args = parser.parse_args(argv)
    at_least(args, 0, "tokens temperature top_k")
    model, checkpoint = load_model(args.checkpoint)
    model.logn = model.logn if args.logn is None else args.logn
    at_least(model, 0, "logn")
    device, _, autocast = find_device(args.device)
    tokenizer = get_tokenizer(checkpoint["tokenizer"], checkpoint["folder"], checkpoint["config"]["data"])
    prompt = tokenizer.bos + tokenizer.encode_ordinary(args.prompt)
    if not prompt:
        raise UserError("the prompt needs at least one character")
    options = dict(temperature=args.temperature, top_k=args.top_k, seed=args.seed)
    with autocast():
        tokens = model.to(device).generate(torch.tensor([prompt], device=device), args.tokens, **options)
    text = [t for t in tokens[0, len(tokenizer.bos) :].tolist() if t < tokenizer.n_vocab]  # the vocabulary is padded
    say(tokenizer.decode(text))


if __name__ == "__main__":
    main()
