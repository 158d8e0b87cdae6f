"""Two processes of torch.distributed against one, piece by piece."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH_NORM = """
import torch
from torch import nn
from data import parallel

parallel.start(torch.device("cpu"))
for shape, ours, theirs in (((8, 5), parallel.BatchNorm1d, nn.BatchNorm1d), ((8, 5, 3, 4), parallel.BatchNorm2d, nn.BatchNorm2d)):
    torch.manual_seed(0)
    x, y, a, b = 3 * torch.randn(shape) + 2, torch.randn(shape), nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    net, reference, per_channel = ours(5), theirs(5), [1, 5] + [1] * (len(shape) - 2)
    nn.init.normal_(net.weight)
    reference.load_state_dict(net.state_dict())
    loss = (net(parallel.shard(x) * a.view(per_channel).square()) - parallel.shard(y)).pow(3).mean()
    parallel.descend(torch.optim.SGD([*net.parameters(), a], 0.0), loss)
    (reference(x * b.view(per_channel).square()) - y).pow(3).mean().backward()
    for p, q in zip([*net.parameters(), a], [*reference.parameters(), b], strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.state_dict(), reference.state_dict(), rtol=1e-5, atol=1e-6)
assert parallel.world() == 2
print("agreed")
parallel.stop()
"""


def test_batch_norm_sees_the_global_batch(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(BATCH_NORM)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("agreed") == 2, done.stderr[-2000:]
