"""Self-dialogue fine-tuning (SA-SFT): write self-dialogues, mix them with task data, train, and record what drifts."""

from sasft.chat import Chat, Encoded, collate
from sasft.data import Row, encode_rows, read_rows
from sasft.errors import UsageError
from sasft.mixing import Plan, make_plan
from sasft.models import LoraSettings, load_model, weights_hash
from sasft.restyle import STYLES, restyle
from sasft.sampling import EXACT, PAPER, Sampler, sample
from sasft.selfdialogue import Writer, answer, answer_until, write_dialogues
from sasft.train import TrainSettings, train
from sasft.trainer import FitSettings, fit

__all__ = [
    "EXACT", "PAPER", "STYLES", "Chat", "Encoded", "FitSettings", "LoraSettings", "Plan", "Row", "Sampler", "TrainSettings",
    "UsageError", "Writer", "answer", "answer_until", "collate", "encode_rows", "fit", "load_model", "make_plan",
    "read_rows", "restyle", "sample", "train", "weights_hash", "write_dialogues",
]
