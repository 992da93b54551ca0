"""How far do the automatic settings depend on the seed?  The law and the step that the defaults choose, over seeds.

python -m bench.studies.seeds [--networks digits multitask] [--seeds 6]
"""

from __future__ import annotations

import argparse

import torch

from bench.machine import described, processor
from bench.studies.time_to_truth_networks import NETWORKS
from bench.studies.time_to_truth_ours import timed
from lossk import provenance

SHOWN = ("localization", "lr", "num_burnin_steps", "num_steps_bw_draws")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=["digits", "multitask"])
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.networks:
        network = NETWORKS[name](None)
        print(f"{name}: {network.what}")
        found = [timed(network, None, num_chains=1, num_draws=2, seed=seed)[0].meta for seed in range(options.seeds)]
        for key in SHOWN:
            values = [float(meta["sampler"][key]) for meta in found]
            print(f"  {key:<18} {min(values):.4g} to {max(values):.4g}: {' '.join(f'{value:.4g}' for value in values)}")
        drawn = [float(meta["pilot"]["drawn_curvature"]) for meta in found]
        print(f"  curvature at draws {min(drawn):.3g} to {max(drawn):.3g}; at w* {found[0]['pilot']['curvature']:.3g}")
    print(f"{processor()}; {described(provenance.versions())}; git {provenance.git_sha()}.")


if __name__ == "__main__":
    main()
