"""Writes networks.npz: what PyTorch answers for weights drawn by name and images drawn from a seed.

    DMOSNET_TORCHREID=<torchreid's models folder> python tests/golden/make_networks.py

Needs the `peers` extra and torchreid, whose modules are loaded by file path; the attention of DM-OSNet is composed of
torch layers in tests/models/torch_peers.py. Weights are not stored: see tests/models/drawn.py.
"""

import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "models"), str(HERE.parent.parent)]
SIZE = (64, 32)
IMAGES = 2


def images() -> np.ndarray:
    """Normalised images, float32 [IMAGES, 64, 32, 3]."""
    return np.random.default_rng(0).normal(size=(IMAGES, *SIZE, 3)).astype(np.float32)


def main() -> None:
    import torch
    import torch_peers as peers
    from drawn import draw

    from dmosnet_jax.models.attention import head_count
    from dmosnet_jax.models.osnet import CHANNELS

    def osnet(width: str, **options):
        return peers.osnet(CHANNELS[width], heads=head_count, **options)

    def dmosnet(width: str, ibn: bool):
        backbone = peers.backbone_only(osnet(width, ibn=ibn, attention=(1, 0, 0)))
        return peers.Baseline(backbone, CHANNELS[width][-1])

    networks = {
        "osnet_x1_0": osnet("x1_0", ibn=False),
        "osnet_x0_25": osnet("x0_25", ibn=False),
        "osnet_ibn_x1_0": osnet("x1_0", ibn=True),
        "dmosnet_x1_0": dmosnet("x1_0", ibn=False),
        "dmosnet_ibn_x1_0": dmosnet("x1_0", ibn=True),
    }
    batch = torch.from_numpy(images().transpose(0, 3, 1, 2))
    answers = {}
    for name, network in networks.items():
        drawn = {
            key: torch.from_numpy(np.asarray(draw(key, tuple(v.shape)))) for key, v in network.state_dict().items()
        }
        network.load_state_dict(drawn)
        network.eval()
        with torch.no_grad():
            found = network(batch)
        answers[name] = (found["feature"] if isinstance(found, dict) else found).numpy()
    np.savez_compressed(HERE / "networks.npz", **answers)


if __name__ == "__main__":
    main()
