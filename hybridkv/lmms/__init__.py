"""Models for lmms-eval 0.7, which finds them by the entry point `lmms_eval.models`.

    lmms-eval --model hybridkv --model_args pretrained=FOLDER,budget=0.1,policy=hybridkv --tasks nextqa_mc_test

`hybridkv` is our Qwen2.5-VL (`ours.py`). What it does with a request is in `answer.py`, which needs no lmms-eval.
"""


def manifests() -> list:
    """What lmms-eval asks for: names, and where their classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="hybridkv", chat_class_path="hybridkv.lmms.ours.HybridKV")]
