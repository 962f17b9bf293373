"""What the papers print, by table: label → cells.

Xiang et al. 2021, *PatchGuard*; below, Levine & Feizi 2020, *(De)Randomized Smoothing*.
"""

from collections.abc import Sequence

Numbers = dict[str, Sequence[str]]

PARAMETERS: Numbers = {
    "Mask-BN on ImageNet, ImageNette and CIFAR-10": ("BagNet-17 logits", "c_l = 0, c_h = ∞, T = 0"),
    "Mask-DS on ImageNet": ("DS-25-ResNet-50 prediction", "c_l = 0, c_h = 1, T = 0"),
    "Mask-DS on ImageNette": ("DS-25-ResNet-50 confidence", "c_l = 0, c_h = 1, T = 0"),
    "Mask-DS on CIFAR-10": ("DS-4-ResNet-18 confidence", "c_l = 0, c_h = 1, T = 0"),
}
COMPARISON_CIFAR10: Numbers = {
    "Mask-BN": ("79.5", "58.6", "76.2", "37.2"),
    "Mask-DS": ("82.6", "72.1", "80.0", "62.2"),
    "IBP": ("65.8", "51.9", "47.8", "30.8"),
    "clipped BagNet": ("84.2", "44.2", "84.2", "9.3"),
    "DS": ("83.9", "68.9", "83.9", "56.2"),
}
COMPARISON_IMAGENETTE: Numbers = {
    "Mask-BN": ("93.0", "87.6", "92.4", "85.2", "91.7", "81.6"),
    "Mask-DS": ("91.2", "83.7", "90.7", "81.0", "90.2", "78.3"),
    "clipped BagNet": ("94.9", "74.6", "94.9", "60.9", "94.9", "45.9"),
    "DS": ("92.1", "82.3", "92.1", "79.1", "92.1", "75.7"),
}
INVARIANCE_IMAGENETTE: Numbers = {
    "masked accuracy, BagNet-17, 26x26 cells": ("95.8", "95.8", "95.7", "95.6", "95.4"),
    "% pictures": ("4.3", "5.3", "6.6", "8.1", "9.8"),
    "% windows per picture": ("0", "0.05", "0.2", "0.4", "0.7"),
}
INVARIANCE_CIFAR10: Numbers = {
    "masked accuracy, BagNet-17 at 192, 22x22 cells": ("86.7", "86.6", "86.4", "85.9", "84.8"),
    "% pictures": ("13.3", "18.7", "23.4", "29.0", "34.7"),
    "% windows per picture": ("0", "0.4", "1.1", "2.3", "4.0"),
}
CLIPPING_IMAGENETTE: Numbers = {
    "ResNet-50": ("99.6", "99.5", "99.5", "99.5", "99.0"),
    "BagNet-33": ("97.4", "97.2", "97.1", "95.8", "93.4"),
    "BagNet-17": ("95.8", "95.1", "94.3", "92.2", "88.5"),
    "BagNet-9": ("92.7", "90.1", "89.1", "87.3", "81.7"),
}
CLIPPING_CIFAR10: Numbers = {
    "ResNet-50": ("97.0", "97.0", "97.0", "96.7", "93.9"),
    "BagNet-33": ("92.1", "91.2", "90.2", "86.8", "79.6"),
    "BagNet-17": ("86.7", "84.1", "83.6", "73.3", "57.8"),
    "BagNet-9": ("80.4", "74.3", "74.2", "61.0", "46.5"),
}
FIELDS_IMAGENETTE: Numbers = {
    "BagNet-33": ("94.7", "87.8", "93.9", "84.5", "93.0", "79.6"),
    "BagNet-17": ("93.0", "87.6", "92.4", "85.2", "91.7", "81.6"),
    "BagNet-9": ("88.0", "82.8", "87.4", "80.5", "86.4", "77.4"),
}
FIELDS_CIFAR10: Numbers = {
    "BagNet-33 at 192": ("84.0", "51.4", "80.4", "26.2", "76.0", "6.0"),
    "BagNet-17 at 192": ("79.5", "58.6", "76.2", "37.2", "72.2", "15.5"),
    "BagNet-9 at 192": ("72.0", "55.0", "69.5", "37.6", "66.3", "17.8"),
}
CASES = "case I or IV {}, II {}, III {}"
THRESHOLDS_IMAGENETTE: Numbers = {
    "T = 0.0": ("92.4", "85.2", "100", CASES.format(0.2, 2.9, 6.8)),
    "T = 0.2": ("92.7", "82.9", "39.9", CASES.format(8.6, 0.4, 3.2)),
    "T = 0.4": ("94.3", "69.2", "3.2", CASES.format(25.2, 0, 0.6)),
    "T = 0.6": ("94.9", "42.3", "0.3", CASES.format(52.7, 0, 0.1)),
    "T = 0.8": ("95.1", "10.4", "0", CASES.format(84.7, 0, 0)),
    "T = 1.0": ("95.1", "0", "0", CASES.format(95.1, 0, 0)),
}
THRESHOLDS_CIFAR10: Numbers = {
    "T = 0.0": ("76.2", "37.2", "76.2", CASES.format(1.1, 24.3, 21.4)),
    "T = 0.2": ("77.8", "31.7", "51.1", CASES.format(41.4, 4.7, 6.3)),
    "T = 0.4": ("83.6", "6.2", "1.2", CASES.format(77.6, 0.05, 0.3)),
    "T = 0.6": ("84.1", "0.2", "0.02", CASES.format(83.9, 0, 0)),
    "T = 0.8": ("84.1", "0", "0", CASES.format(84.1, 0, 0)),
    "T = 1.0": ("84.1", "0", "0", CASES.format(84.1, 0, 0)),
}
BAGNET_EVIDENCE_IMAGENETTE: Numbers = {
    "logits": ("93.0", "87.6", "92.4", "85.2", "91.7", "81.6"),
    "confidence": ("84.6", "77.9", "84.2", "75.1", "83.4", "71.8"),
    "prediction": ("80.3", "72.4", "80.2", "69.6", "79.7", "66.6"),
}
BAGNET_EVIDENCE_CIFAR10: Numbers = {
    "logits": ("79.5", "58.6", "76.2", "37.2", "72.2", "15.5"),
    "confidence": ("58.3", "44.7", "57.2", "33.7", "55.0", "21.5"),
    "prediction": ("53.0", "38.4", "52.7", "27.4", "51.9", "16.7"),
}
BAND_EVIDENCE_IMAGENETTE: Numbers = {
    "logits": ("91.6", "78.0", "91.1", "70.5", "90.6", "63.7"),
    "confidence": ("91.2", "83.7", "90.7", "81.0", "90.2", "78.3"),
    "prediction": ("91.4", "83.2", "90.3", "80.2", "89.8", "77.7"),
}
BAND_EVIDENCE_CIFAR10: Numbers = {
    "logits": ("82.9", "64.3", "80.5", "43.1", "77.7", "17.7"),
    "confidence": ("82.6", "72.1", "80.0", "62.2", "77.1", "48.2"),
    "prediction": ("82.5", "71.9", "80.4", "61.3", "77.6", "47.8"),
}
TIME_IMAGENETTE: Numbers = {
    "ResNet-50": ("16.5 ms",),
    "BagNet-17": ("19.5 ms",),
    "Mask-BN": ("21.8 ms",),
    "DS-25-ResNet": ("378.0 ms",),
    "Mask-DS": ("379.1 ms",),
}
TIME_CIFAR10: Numbers = {
    "ResNet-50, 32x32": ("11.9 ms",),
    "ResNet-50, 192x192": ("12.7 ms",),
    "BagNet-17, 192x192": ("13.1 ms",),
    "Mask-BN, 192x192": ("13.7 ms",),
    "ResNet-18, 32x32": ("5.9 ms",),
    "DS-4-ResNet-18": ("122.2 ms",),
    "Mask-DS": ("122.4 ms",),
}
# Tables II, IV, VI and XXI; what stands before the first comma is the data that ours are of
LOCAL_PREDICTIONS: Numbers = {  # wrong local predictions: attacked, before, difference; wrong global ones
    "CIFAR-10, ResNet-50": ("68.2", "13.6", "54.6", "79.2"),
    "ImageNette, ResNet-50": ("52.8", "15.2", "37.6", "96.0"),
    "ImageNette, ResNet-50 on ImageNet": ("84.1", "59.8", "24.3", "99.5"),
}
UNDEFENDED: Numbers = {  # for each patch: clean, attacked
    "CIFAR-10, ResNet-50 at 192, LaVAN, one random place": ("97.0", "83.4", "97.0", "38.2"),
    "CIFAR-10, BagNet-17 at 192, LaVAN, one random place": ("86.7", "35.8", "86.7", "0.7"),
    "ImageNette, ResNet-50, LaVAN, one random place": ("99.6", "47.3", "99.6", "14.9", "99.6", "4.0"),
    "ImageNette, BagNet-17, LaVAN, one random place": ("95.8", "39.1", "95.8", "11.7", "95.8", "2.9"),
    "ImageNette, ResNet-50 on ImageNet, LaVAN, one random place": ("76.1", "11.7", "76.1", "2.8", "76.1", "0.5"),
    "ImageNette, BagNet-17 on ImageNet, LaVAN, one random place": ("58.8", "8.4", "58.8", "3.8", "58.8", "2.0"),
}
UNDEFENDED_FIELDS: Numbers = {  # clean, attacked by 1 %, 2 %, 3 %
    "ImageNette, ResNet-50, LaVAN, one random place": ("99.6", "47.3", "14.9", "4.0"),
    "ImageNette, BagNet-33, LaVAN, one random place": ("97.4", "27.0", "4.8", "1.1"),
    "ImageNette, BagNet-17, LaVAN, one random place": ("95.8", "39.1", "11.7", "2.9"),
    "ImageNette, BagNet-9, LaVAN, one random place": ("92.7", "26.8", "14.8", "3.8"),
}
AGGREGATIONS: Numbers = {  # clean, attacked by 2 % at one random place
    "ImageNette, ResNet-50, mean": ("99.6", "14.9"),
    "ImageNette, ResNet-50, tanh(0.05u − 1)": ("99.5", "49.0"),
    "ImageNette, ResNet-50, clipped to (0, 15)": ("99.6", "53.8"),
    "ImageNette, ResNet-50, median": ("98.7", "76.8"),
}

SMOOTHING_BEST: Numbers = {  # Table 1: certified, clean; of Chiang et al. 2020, and of Levine & Feizi
    "MNIST": ("60.4", "92.0", "52.44", "96.54"),
    "CIFAR-10": ("30.3", "47.8", "57.58", "83.82"),
    "ImageNet": ("N/A", "N/A", "13.9", "44.6"),
}
SMOOTHING_METHODS: Numbers = {  # Table 2
    "MNIST": ("53.22 (s = 2)", "22.20 (s = 6)", "16.32 (s = 6)"),
    "CIFAR-10": ("58.08 (s = 4)", "57.36 (s = 4)", "50.38 (s = 6)"),
}
SMOOTHING_CHOICE: Numbers = {  # Figure 5: the best of its grid
    "MNIST": ("columns, s = 2, θ = 0.3",),
    "CIFAR-10": ("columns, s = 4, θ = 0.3",),
    "ImageNet": ("columns, s = 25, θ = 0.2",),
}
