"""One image classified from a cold process, the plain timm way: `timm_predict.py IMAGE CLASSES`."""

import json
import sys

import lite0
import timm
import torch
from PIL import Image


def main(path, classes):
    model = lite0.make(int(classes)).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        probabilities = model(transform(Image.open(path).convert("RGB"))[None]).softmax(1)[0]
    print(json.dumps({"prediction": int(probabilities.argmax()), "score": float(probabilities.max())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
