"""The catastrophic forgetting score of every image (Luo et al., arXiv 2111.12084): which half of LUPerson to train on.

    python -m dmosnet_jax.main --config=configs/cfs_luperson.py --workdir=runs/cfs --config.data_dir=data \
        --config.checkpoint_pretrained=runs/proxy_spcl --config.checkpoint_finetuned=runs/proxy_finetuned

An image's score is the cosine of its embeddings under a proxy network that was pre-trained on these images and under
the same one fine-tuned on a labelled data set: what fine-tuning does not forget is near to people as re-identification
data show them. Higher is kept. Each checkpoint is anything that `configs/evaluate.py` takes. Writes `scores.npz` (a
float32 for each record, in the order of the shards), `names.txt.gz` (all file names, best first) and
`contact_sheet.png` (images at 0, 25, 50, 75 and 100 % of the order). A run that was killed goes on where it was.
`configs/spcl_luperson.py:cfs=runs/cfs/scores.npz` trains on the better half. Any split of any data set can be scored:
`configs/cfs_luperson.py:market1501,split=gallery`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, dataset="luperson", pretrained="", finetuned="", split="train")
    config = common.base("cfs")
    config.dataset = options["dataset"]
    config.split = options["split"]
    config.checkpoint_pretrained = options["pretrained"]
    config.checkpoint_finetuned = options["finetuned"]
    common.as_trained(config)
    # Images scored between two files on disk, which is what a killed run loses at most; columns of the contact sheet.
    config.cfs = ConfigDict({"chunk_images": 65536, "sheet_columns": 8})
    return config
