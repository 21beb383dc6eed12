"""A folder of data in the shape of the public sets, a few rows each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

GSM8K = {"test": [{"question": "Ann has 3 apples and buys 4. How many has she?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
                  {"question": "A box holds 12 eggs. How many do 2 boxes hold?", "answer": "12 * 2 = 24\n#### 24"}],
         "train": [{"question": "Tom reads 5 pages a day. How many in 3 days?", "answer": "5 * 3 = 15\n#### 15"},
                   {"question": "Ann has 3 apples and buys 4. How many  has she?", "answer": "Seven.\n#### 7"},  # also in test
                   {"question": "Li has 9 pens and loses 2. How many are left?", "answer": "9 - 2 = 7\n#### 7"}]}
SOURCE = "This question refers to the following information.\nAll roads lead somewhere, wrote the traveller.\n"
MMLU = {"test": [{"subject": "astronomy", "question": "What does the moon circle?", "choices": ["Mars", "Earth", "Venus", "Sun"],
                  "answer": 1},
                 {"subject": "world_history", "question": SOURCE + "Who wrote it?",
                  "choices": ["A king", "A traveller", "A cook", "A poet"],
                  "answer": 1},
                 {"subject": "world_history", "question": SOURCE + "What is it about?",
                  "choices": ["Roads", "Seas", "Kings", "Bread"],
                  "answer": 0}],
        "dev": [{"subject": subject, "question": f"Development question {i} on {subject}?", "choices": ["a", "b", "c", "d"],
                 "answer": i % 4}
                for subject in ("astronomy", "world_history") for i in range(5)]}
AGIEVAL = {
    "aqua-rat": [{"passage": None, "question": f"What is {i} + {i}?",
                  "options": [f"({letter}){2 * i + j}" for j, letter in enumerate("ABCDE")],
                  "label": "A", "answer": None} for i in range(1, 5)],
    "sat-math": [{"passage": "A plan." if i < 2 else "", "question": f"If x = {i}, what is x?",
                  "options": [f"({letter}){i + j}" for j, letter in enumerate("ABCD")],
                  "label": "B", "answer": None} for i in range(3)],
    "math": [{"passage": None, "question": "Write one half as a fraction.", "options": None, "label": None,
              "answer": "\\frac{1}{2}"}]}
IFEVAL = [{"key": 1000, "prompt": "Write a line without commas and with at least 3 words.",
           "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
           "kwargs": [{}, {"num_words": 3, "relation": "at least"}]},
          {"key": 1001, "prompt": "Name a colour in capitals.", "instruction_id_list": ["change_case:english_capital"],
           "kwargs": [{}]}]
PIQA = [{"goal": "Cool the soup.", "sol1": "Blow on it.", "sol2": "Boil it once more for an hour or so."},
        {"goal": "Open a jar.", "sol1": "Hit it with the sea.", "sol2": "Turn the lid."}]
LABELS = [0, 1]
CONTEXT = "Context: The ferry left early and the family stayed on the quay."
SUPER_NI = [{"id": "a-1", "input": f"{CONTEXT}\nQuestion: Why did they stay?", "output": "The ferry had left."},
            {"id": "a-2", "input": f"{CONTEXT}\nQuestion: How did they feel?", "output": "Sad."},
            {"id": "a-3", "input": "Context: The dog of the farmer slept all day long in the sun.\nQuestion: Who slept?",
             "output": "The dog."}]
DEFINITION = "Answer the question about the context."
PUBLISHED = {"Definition": ["Say the", "next number."], "Positive Examples": [{"input": "1", "output": "2", "explanation": ""},
                                                                            {"input": "5", "output": "6", "explanation": ""}],
             "Instances": [{"id": "b-1", "input": "5", "output": ["6", "six"]}, {"id": "b-2", "input": "7", "output": ["8"]}]}
MEDICAL = [{"question": f"Is illness number {i} inherited?", "answer": f"Illness {i} is not.", "summary": f"Is {i} inherited?"}
           for i in range(40)]


def jsonl(path: Path, rows: Sequence[Mapping]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write(folder: Path) -> Path:
    """All sets; returns the folder."""
    for name, splits in (("gsm8k", GSM8K), ("mmlu", MMLU), ("agieval", AGIEVAL)):
        for split, rows in splits.items():
            jsonl(folder / name / f"{split}.jsonl", rows)
    jsonl(folder / "ifeval/input_data.jsonl", IFEVAL)
    jsonl(folder / "piqa/valid.jsonl", PIQA)
    (folder / "piqa/valid-labels.lst").write_text("".join(f"{label}\n" for label in LABELS))
    jsonl(folder / "super_ni/task007_on_the_quay.test.jsonl", SUPER_NI)
    jsonl(folder / "super_ni/task007_on_the_quay.train.jsonl", [{"id": "t-0", "input": SUPER_NI[1]["input"], "output": "Sad."},
                                                               {"id": "t-1", "input": "Context: It rains.\nQuestion: Is it dry?",
                                                                "output": "No."}])
    (folder / "super_ni/task007_on_the_quay.definition.txt").write_text(DEFINITION + "\n")
    (folder / "super_ni/task008_next_number.json").write_text(json.dumps(PUBLISHED))
    for name in ("medquad_short", "meqsum", "medtext"):
        jsonl(folder / name / f"{name}.jsonl", MEDICAL)
    return folder
