"""train.py and the model on a CUDA GPU, against the CPU. Skipped where there is no GPU."""

import numpy as np
import pytest
import torch
from conftest import make_data
from runs import FOX, command, logged, run

import train

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# The tiny preset on 16 sequences, 8 a step. The recipe's warmup would hardly move the weights in 20 steps.
FLAGS = "--steps=20 --warmup=0 --batch_tokens=4096 --log_every=1 --save_every=10 --eval_every=20 --eval_tokens=1024"
FLAGS = f"{FLAGS} --eval_trials=0".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "fox", np.resize(FOX, 16 * 512 + 1), FOX[:1100])


def trained(out, data, *flags, device=GPU, dtype="float32", compiled="off"):
    """The run's folder, made unless it is there."""
    if not out.exists():
        more = [f"--device={device}", f"--dtype={dtype}", f"--compile={compiled}", *flags]
        result = run([*FLAGS, f"--data={data}", f"--out={out}", *more])
        assert result.returncode == [0], result.stderr
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("pos", ["fope", "rope", "alibi", "kerple", "fire", "nope"])
def test_trains_as_on_the_cpu(pos, data, folder):
    theirs = logged(trained(folder / f"{pos}-cpu", data, f"--pos={pos}", device="cpu"), "loss")
    ours = logged(trained(folder / f"{pos}-gpu", data, f"--pos={pos}"), "loss")
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4) and len(ours) == 20
    fast = logged(trained(folder / f"{pos}-fast", data, f"--pos={pos}", dtype="bfloat16", compiled="on"), "loss")
    assert fast == pytest.approx(theirs, rel=0.02, abs=0.02)


def test_torchrun_with_nccl(data, folder):
    flags = [*FLAGS, f"--data={data}", f"--out={folder / 'nccl'}", "--dtype=float32", "--compile=off"]
    status, printed, stderr = command("-m", "torch.distributed.run", "--standalone", "train.py", *flags)
    assert status == 0 and "over nccl" in printed, stderr
    assert logged(folder / "nccl", "loss") == pytest.approx(logged(trained(folder / "whole", data), "loss"), rel=1e-5)


def test_a_step_waits_for_the_gpu_once(data, folder, recwarn):
    counts = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for steps in (2, 12):
            recwarn.clear()
            more = [f"--steps={steps}", "--log_every=99", "--save_every=99", "--compile=off", "--eval_every=99"]
            train.train(train.parse_flags([*FLAGS, f"--data={data}", f"--out={folder / f'waits-{steps}'}", *more]))
            counts.append(sum("synchroniz" in str(warning.message) for warning in recwarn))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counts[1] - counts[0] == 10
