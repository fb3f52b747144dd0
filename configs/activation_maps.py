"""Where a network looks: activation maps of a folder of images (paper, Figure 7), as pictures and as numbers.

    python -m dmosnet_jax.main --config=configs/activation_maps.py --config.images=photos \
        --config.checkpoint=runs/dmosnet --config.compare=runs/osnet --config.output=maps

For every image the folder gets `<name>.png`: the image, its map and both together, of `checkpoint` and, where it is
given, of `compare`. `maps.npz` has `maps`, float32 [N, h, w] of unit L2 length, and `files`; `compared.npz` those of
`compare`. A map is the sum of squares over the channels of the last convolutional map.

Where a network has DL-MHSA there is also `<name>.attention.png`, of the first that has: what the position
`attention_at` (row and column as shares of height and width) takes from where, one map for each head of the last block
with attention.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, images="", checkpoint="", compare="", output="activation_maps")
    config = common.base("activation_maps")
    for field, value in options.items():
        config[field] = value
    common.as_trained(config)
    config.attention_at = (0.5, 0.5)
    return config
