"""Small local benchmarks for the bundled model: boards in MileBench's layout, and clips of boards in NExT-QA's."""

import json
from pathlib import Path

from PIL import Image

from demo import boards as bd

MILEBENCH = {  # subset: task of the boards, and the kind of its questions
    "CLEVR-Change": ("compare", "open-ended"),
    "WebQA": ("lookup", "multi-choice"),
    "MMCoQA": ("right", "open-ended"),
}


def milebench(folder: Path, samples: int = 3, side: int = 12) -> None:
    """Writes SUBSET/SUBSET.json and SUBSET/images for each of `MILEBENCH`."""
    for subset, (task, kind) in MILEBENCH.items():
        (folder / subset / "images").mkdir(parents=True)
        rows = []
        for i in range(samples):
            sample = bd.make_sample("test", i, task, side, side)
            names = [f"{i}-{n}.png" for n in range(1, len(sample.images) + 1)]
            for name, picture in zip(names, sample.images, strict=True):
                picture.save(folder / subset / "images" / name)
            places = " ".join(f"{{image#{n}}}" for n in range(1, len(names) + 1))
            instance = {"context": places + sample.question.text, "images_path": names}
            if kind == "multi-choice":
                instance["choice_list"] = ["nothing", sample.question.answer, "aa bb", "cc dd"]
            rows.append(
                {
                    "sample_id": i,
                    "task_instruction_id": 0,
                    "task_instance": instance,
                    "response": sample.question.answer,
                    "image_quantity_level": "Few",
                }
            )
        about = {"task_instruction": [""], "question_type": kind}
        (folder / subset / f"{subset}.json").write_text(json.dumps({"meta_data": about, "data": rows}))


def nextqa(home: Path, tasks: Path, samples: int = 3) -> None:
    """Clips where lmms-eval looks for NExT-QA's, below its HF_HOME, and a task with its questions and metric."""
    av = __import__("av")
    clips = home / "nextqa" / "NExTVideo"
    clips.mkdir(parents=True)
    tasks.mkdir(parents=True)
    rows = []
    for i in range(samples):
        board = bd.make_sample("test", i, "lookup", 6, 6)
        with av.open(str(clips / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width, stream.height = board.images[0].size
            for shift in range(8):
                frame = Image.fromarray(bd.np.roll(bd.np.asarray(board.images[0]), 28 * (shift // 2), axis=1))
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())
        choices = {f"a{n}": text for n, text in enumerate((board.question.answer, "aa bb", "cc dd", "ee ff", "gg hh"))}
        rows.append({"video": str(i), "question": board.question.text, "answer": 0, "qid": str(i)} | choices)
    (tasks / "nextqa.json").write_text("\n".join(map(json.dumps, rows)))
    ours = "!function lmms_eval.tasks.nextqa.utils.nextqa"
    (tasks / "nextqa_local.yaml").write_text(
        f"""task: nextqa_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {json.dumps(str(tasks / "nextqa.json"))}}}}}
test_split: test
output_type: generate_until
doc_to_visual: {ours}_doc_to_visual
doc_to_text: {ours}_doc_to_text_mc
doc_to_target: {ours}_doc_to_target
process_results: {ours}_mc_process_results
generation_kwargs: {{max_new_tokens: 8, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
