#!/usr/bin/env bash
# Pillow 13.0.0.
#
# A grey TIFF says whether 0 is black or white (PhotometricInterpretation 1 or 0). At 8 bits Pillow inverts the second
# kind, so that both open as the same picture. At 16 bits it does not: a picture written with white as zero opens as its
# negative, without a word. The files are made here, field by field, as scanners write them.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --quiet --disable-pip-version-check pillow==13.0.0
"$folder/env/bin/python" - <<'PY'
import io
import struct

import PIL
from PIL import Image

print("Pillow", PIL.__version__)


def tiff(samples, bits, photometric):
    data = b"".join(value.to_bytes(bits // 8, "little") for value in samples)
    fields = {256: len(samples), 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    rows = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in fields.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(fields)) + rows + bytes(4)


def opened(samples, bits, photometric):
    image = Image.open(io.BytesIO(tiff(samples, bits, photometric)))
    return image.mode, list(image.get_flattened_data())


eight = opened([0, 100, 200, 255], 8, 1), opened([255, 155, 55, 0], 8, 0)
sixteen = opened([0, 25700, 51400, 65535], 16, 1), opened([65535, 39835, 14135, 0], 16, 0)
print("8 bits,  black is zero / white is zero, the same picture:", *eight)
print("16 bits, black is zero / white is zero, the same picture:", *sixteen)
assert eight[0] == eight[1], "8-bit pictures used to open alike"
assert sixteen[1] == ("I;16", [65535, 39835, 14135, 0]), "16-bit pictures with white as zero used to open inverted"
PY
