"""fastai's usual way: `vision_learner(timm's tf_efficientnet_lite0).fine_tune(EPOCHS)` at 224 px
with its default augmentations.

fastai_fit.py SPLIT.json EPOCHS FLIP SEED

SPLIT.json: {"root": folder, "train": [[path, class], …], "test": [[path, class], …]}; FLIP is 1 or
0 (letters, digits). Validation after every epoch is left out, which only makes it faster; the test
images are judged once, at the end. The printed seconds begin before the imports.
"""

import json
import sys
import time
import warnings

START = time.perf_counter()
warnings.filterwarnings("ignore")

import lite0
import pandas
import timm
from fastai.vision.all import (
    Callback,
    CancelValidException,
    ImageDataLoaders,
    Resize,
    accuracy,
    aug_transforms,
    default_device,
    set_seed,
    vision_learner,
)

# fastai asks timm for pretrained weights by name; these come from the package instead of the hub.
timm.create_model = lambda name, pretrained=True, num_classes=0, **how: lite0.make(num_classes, **how)


class NoValidation(Callback):
    def before_validate(self):
        raise CancelValidException


def main(split, epochs, flip, seed):
    about = json.load(open(split))
    default_device(False)
    set_seed(int(seed), reproducible=True)
    rows = [(path, name, False) for path, name in about["train"]] + [(path, name, True) for path, name in about["test"]]
    table = pandas.DataFrame(rows, columns=["path", "label", "test"])
    dls = ImageDataLoaders.from_df(
        table, about["root"], fn_col="path", label_col="label", valid_col="test", item_tfms=Resize(224),
        batch_tfms=aug_transforms(do_flip=flip == "1"),
    )
    learn = vision_learner(dls, "tf_efficientnet_lite0", metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(int(epochs), cbs=NoValidation())
        trained = time.perf_counter()
        probabilities, y = learn.get_preds()
    right = float((probabilities.argmax(1) == y).float().mean())
    seconds = time.perf_counter() - START
    print(json.dumps({"accuracy": right, "n": len(y), "seconds": seconds, "training": trained - START, "epochs": int(epochs)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
