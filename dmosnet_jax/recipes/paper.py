"""What the paper reports (Zhou et al., Sensors 2022, 22, 6293), to be put beside results of one's own."""

from dmosnet_jax.models import Model

CONDITIONS = (
    "the paper (Sensors 2022, 22, 6293, Tables 2 to 4): width 1.0, 256x128, fine-tuned from scratch (ResNet50: from "
    "ImageNet), or after SpCL on LUPerson; official queries and gallery"
)
MARKET = "market1501"
# Columns of a table: from scratch, and after LUPerson.
NAMES = ("paper's mAP", "paper's rank-1", "paper's mAP, LUPerson", "paper's rank-1, LUPerson")

# mAP and rank-1 in percent.
Figures = tuple[float | None, float | None]
# Name and DL-MHSA mask.
_Network = tuple[str, tuple[int, int, int]]

_NONE: Figures = (None, None)
_OSNET, _DMOSNET, _RESNET = "osnet_x1_0", "dmosnet_x1_0", "resnet50"
_DATA_SETS = (MARKET, "dukemtmc", "cuhk03_detected", "cuhk03_labeled", "msmt17")
_FROM_SCRATCH: dict[_Network, tuple[Figures, ...]] = {
    # Table 2.
    (_OSNET, (0, 0, 0)): ((84.9, 94.8), (73.5, 88.6), (67.8, 72.3), _NONE, (52.9, 78.7)),
    (_DMOSNET, (1, 0, 0)): ((86.76, 95.26), (76.87, 89.45), (68.81, 71.50), (71.56, 74.00), (55.96, 80.25)),
    (_DMOSNET, (0, 1, 0)): ((86.68, 95.01), (76.65, 89.54), (68.90, 71.20), (70.73, 72.71), (55.29, 80.03)),
    (_DMOSNET, (0, 0, 1)): ((86.42, 95.06), (76.58, 89.68), (69.09, 71.36), (70.86, 73.57), (54.03, 79.26)),
    (_DMOSNET, (1, 1, 1)): ((84.93, 93.88), (75.03, 87.75), (66.90, 68.70), (69.89, 71.79), (52.23, 77.37)),
    # Table 3.
    (_RESNET, (0, 0, 0)): ((81.95, None),),
}
_AFTER_LUPERSON: dict[_Network, tuple[Figures, ...]] = {
    # Table 3.
    (_RESNET, (0, 0, 0)): ((83.23, None),),
    (_OSNET, (0, 0, 0)): ((86.16, None),),
    # Table 4.
    (_DMOSNET, (1, 0, 0)): ((87.36, 95.61), (78.26, 89.18), (70.59, 73.0), (72.96, 74.57), (57.13, 80.96)),
}


def figures(
    name: str, attention: tuple[int, int, int] = (0, 0, 0), dataset: str = MARKET, *, pretrained: bool = False
) -> Figures:
    """The paper's mAP and rank-1 of a network on a data set, in percent; None where it gives none.

    Args:
        name: registry name; other widths, and networks that the paper does not describe, have no figures.
        attention: DL-MHSA mask over conv2, conv3, conv4.
        dataset: its name.
        pretrained: after SpCL on LUPerson, not from scratch.
    """
    if name in (_OSNET, _DMOSNET):
        # Attention is what tells the two apart.
        name = _DMOSNET if any(attention) else _OSNET
    table = _AFTER_LUPERSON if pretrained else _FROM_SCRATCH
    return dict(zip(_DATA_SETS, table.get((name, attention), ()), strict=False)).get(dataset, _NONE)


def columns(model: Model, dataset: str) -> dict[str, float | None]:
    """The paper's figures of a network on a data set, by `NAMES`."""
    found = (figures(model.name, model.attention, dataset, pretrained=pretrained) for pretrained in (False, True))
    return dict(zip(NAMES, [value for pair in found for value in pair], strict=True))
