"""Models for lmms-eval 0.7, which finds them by the entry point `lmms_eval.models`.

    lmms-eval --model hybridkv --model_args pretrained=FOLDER,budget=0.1,policy=hybridkv --tasks nextqa_mc_test

`hybridkv` is our Qwen2.5-VL (`ours.py`), `hybridkv_hf` any model of transformers that the adapter knows (`adapter.py`).
What they do with requests is in `answer.py` and `answer_hf.py`, which need no lmms-eval.
"""


def manifests() -> list:
    """What lmms-eval asks for: names, and where their classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(model_id="hybridkv", chat_class_path="hybridkv.lmms.ours.HybridKV"),
        ModelManifest(model_id="hybridkv_hf", chat_class_path="hybridkv.lmms.adapter.HybridKVHF"),
    ]
