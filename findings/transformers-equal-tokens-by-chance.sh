#!/usr/bin/env bash
# transformers 5.22.1 with tokenizers 0.23.3.
#
# Two tokens are added to a CLIP tokenizer that differ in case alone, as two people's placeholders do after their
# embeddings were put into one model. CLIP lowers case before it looks tokens up, so both become the same text. Which of
# the two ids a prompt gets is then not decided by the files: the same folder, loaded forty times by one process, gives
# now one id and now the other.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --quiet --disable-pip-version-check transformers==5.22.1 tokenizers==0.23.3
"$folder/env/bin/python" - "$folder" <<'PY'
import collections
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from transformers import AddedToken, CLIPTokenizer

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
folder = Path(sys.argv[1]) / "tokenizer"
folder.mkdir()
letters = [chr(number) for number in range(ord("!"), ord("~") + 1)]
pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
(folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
(folder / "merges.txt").write_text("#version: 0.2\n")
tokenizer = CLIPTokenizer.from_pretrained(folder)
tokenizer.add_tokens([AddedToken("<Cat>", normalized=True), AddedToken("<cat>", normalized=True)])
tokenizer.save_pretrained(folder / "saved")

ids = collections.Counter(CLIPTokenizer.from_pretrained(folder / "saved")("a <cat>").input_ids[2] for _ in range(40))
print("the id of <cat> in forty loads of one folder:", dict(ids), "added as", tokenizer.get_added_vocab()["<cat>"])
assert len(ids) == 2, "the id used to change from load to load"
PY
