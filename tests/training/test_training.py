"""orthrus-train: its arithmetic is the runtime's, it goes on where it was killed, it says what is
wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from orthrus_converters.safetensors_file import read_header
from orthrus_converters.tensor_names import official_names
from tiny_model import BASES, BLOCK_SIZE, MASK, N_VOCAB, write_heads, write_model

from orthrus_gguf.cli.train import main
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Segment, View
from orthrus_gguf.training.network import Network
from orthrus_gguf.training.output import write_sidecar
