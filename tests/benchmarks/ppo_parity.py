"""Regenerate trl 1.12's numbers for tests/parity/test_trl_ppo.py: `make bench BENCH=ppo_parity`."""

import subprocess

from ppo import HERE, ROOT, Clock, peer_python

if __name__ == "__main__":
    file = ROOT / "tests" / "parity" / "trl_ppo.json"
    subprocess.run([peer_python(Clock(0)), HERE / "ppo_peer.py", "--parity", file], check=True)
