"""Image files and archives that mistakes and attackers make, from one seeded generator."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffcore.data import UnreadableFileError, load_images
from diffcore.data import files as files_module
from diffcore.data.decode import decode
from diffcore.errors import UserError
from diffcore.testing.images import encoded
from diffcore.testing.sentinel import listing, sentinel

LIMIT = 64_000_000
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


def random_pixels(height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, channels), dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, *extra: bytes, depth: int = 8, colour: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + chunk(b"IEND", b"")


def broken_images() -> Iterator[tuple[str, bytes]]:
    """At least sixty files that must be refused, each with a name."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(random_pixels())
    whole = {kind: encoded(image, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")}
    for kind, data in whole.items():
        for part in (0.02, 0.3, 0.6, 0.8):
            yield f"{kind} cut at {part}", data[: int(len(data) * part)]
        yield f"{kind} magic alone", data[:12]
        yield f"{kind} with zeros for content", data[:16] + bytes(len(data) - 16)
        noise = rng.integers(0, 256, len(data), dtype=np.uint8).tobytes()
        yield f"{kind} with noise for content", data[:12] + noise[12:]
    pixels = png(4, 4, bytes(20))
    yield "empty", b""
    yield "one byte", b"\x89"
    yield "text", b"just text, named .png"
    yield "html", b"<html><p>Not found</p></html>"
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    yield "noise", rng.integers(0, 256, 5000, dtype=np.uint8).tobytes()
    yield "zip", b"PK\x05\x06" + bytes(18)
    yield "git lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for kind in ("GIF", "PPM", "TGA", "PCX", "ICO", "SGI", "IM", "EPS", "PDF", "DDS"):
        yield f"format {kind}", encoded(image, kind)
    yield "too many pixels", png(60_000, 60_000, b"")
    yield "just over the limit", png(8001, 8000, bytes(8001))
    yield "too wide", png(2**31 - 1, 1, b"")
    yield "no width", png(0, 4, b"")
    yield "bad crc", pixels.replace(b"IHDR", b"IHDX", 1)
    yield "damaged header checksum", pixels[:29] + bytes(4) + pixels[33:]
    yield "unknown colour type", png(4, 4, bytes(20), colour=5)
    yield "too little data", png(40, 40, bytes(3))
    yield "chunk longer than the file", pixels[:8] + struct.pack(">I", 2**30) + pixels[12:]
    for name, values in (
        ("nan", [np.nan, 0.5]),
        ("infinite", [np.inf, 0.5]),
        ("negative", [-0.1, 0.5]),
        ("above one", [0.5, 255.0]),
    ):
        yield f"float tiff {name}", encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    yield "integers of unknown range", encoded(Image.fromarray(np.array([[70_000, 1]], dtype=np.int32)), "TIFF")
    yield "negative integers", encoded(Image.fromarray(np.array([[-1, 1]], dtype=np.int32)), "TIFF")


BROKEN = dict(broken_images())


def test_there_are_sixty_of_them():
    assert len(BROKEN) >= 60


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_refused_with_a_reason(name):
    with pytest.raises(UnreadableFileError) as caught:
        decode(BROKEN[name], max_pixels=LIMIT)
    reason = str(caught.value)
    assert reason.startswith(("is not a PNG", "is damaged: ", "has ", "holds "))
    assert reason.isprintable()


def test_a_folder_of_broken_images_skips_each_once(tmp_path):
    for number, data in enumerate(BROKEN.values()):
        (tmp_path / f"{number:03}.png").write_bytes(data)
    (tmp_path / "good.png").write_bytes(encoded(Image.fromarray(random_pixels()), "PNG"))
    before = listing(tmp_path)
    with sentinel(tmp_path) as events:
        loaded = load_images(tmp_path)
    assert events == []
    assert listing(tmp_path) == before
    assert loaded.names == ("good.png",)
    assert [name for name, _ in loaded.skipped] == [f"{number:03}.png" for number in range(len(BROKEN))]


def test_flipped_bytes_never_escape_as_another_error():
    rng = np.random.default_rng(1)
    image = Image.fromarray(random_pixels())
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
        data = np.frombuffer(encoded(image, kind), dtype=np.uint8)
        for _ in range(60):
            flipped = data.copy()
            flipped[rng.integers(0, min(len(data), 400), 3)] = rng.integers(0, 256, 3)
            try:
                pixels = decode(flipped.tobytes(), max_pixels=10_000).pixels
            except UnreadableFileError:
                continue
            assert pixels.dtype == np.uint8
            assert pixels.shape[0] == 3


def grey16(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values.astype(np.uint16)), "PNG")


def test_sixteen_bit_grey_is_divided_not_clipped():
    values = np.array([[0, 257, 31_097, 65_535]])
    assert decode(grey16(values), max_pixels=LIMIT).pixels[0].tolist() == [[0, 1, 121, 255]]
    tiff = encoded(Image.fromarray(values.astype(np.uint16)), "TIFF")
    assert decode(tiff, max_pixels=LIMIT).pixels[1].tolist() == [[0, 1, 121, 255]]
    rotated = Image.fromarray(np.array([[0, 65_535]], dtype=np.uint16))
    exif = rotated.getexif()
    exif[0x0112] = 6
    assert decode(encoded(rotated, "PNG", exif=exif), max_pixels=LIMIT).pixels[0].tolist() == [[0], [255]]


def tiff(values: bytes, bits: int, kind: int = 1, photometric: int = 1) -> bytes:
    """Returns a grey TIFF of 4 x 1 samples, as scientific tools write them."""
    entries = {256: 4, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(values), 339: kind}
    rows = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in entries.items()
    )
    values += bytes(len(values) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + struct.pack("<H", len(entries)) + rows + bytes(4)


def test_integer_tiffs_keep_their_values():
    eight = np.array([0, 1, 200, 255], dtype=np.uint8)
    assert decode(tiff(eight.tobytes(), 8), max_pixels=LIMIT).pixels[0, 0].tolist() == [0, 1, 200, 255]
    sixteen = np.array([0, 257, 51_400, 65_535], dtype=np.uint16)
    assert decode(tiff(sixteen.tobytes(), 16), max_pixels=LIMIT).pixels[0, 0].tolist() == [0, 1, 200, 255]
    twelve = bytes([0x00, 0x00, 0x80, 0xFF, 0xF8, 0x00])  # 0, 128, 4095, 2048: two samples in three bytes
    assert decode(tiff(twelve, 12), max_pixels=LIMIT).pixels[0, 0].tolist() == [0, 8, 255, 128]


@pytest.mark.parametrize(
    ("dtype", "kind", "photometric", "message"),
    [
        (np.int8, 2, 1, "holds signed integers of 8 bits, whose range is not known"),
        (np.int16, 2, 1, "holds signed integers of 16 bits, whose range is not known"),
        (np.int32, 2, 1, "holds signed integers of 32 bits, whose range is not known"),
        (np.uint32, 1, 1, "holds unsigned integers of 32 bits, whose range is not known"),
        (np.uint16, 1, 0, "holds 16 bits of which 0 is white"),
    ],
)
def test_integer_tiffs_of_unknown_range_are_refused_by_name(dtype, kind, photometric, message):
    values = np.array([0, 1, 2, 100], dtype=dtype)
    with pytest.raises(UnreadableFileError, match=message):
        decode(tiff(values.tobytes(), values.itemsize * 8, kind, photometric), max_pixels=LIMIT)


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/>' + b" " * 2**21
LONG = {
    "compressed text": (chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2**21))), False),
    "international text": (chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"x" * 2**21)), False),
    "colour profile": (chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2**21))), False),
    "editor's notes": (chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)), True),
    "many texts": (b"".join(chunk(b"tEXt", b"k\0" + b"x" * 2**20) for _ in range(65)), False),
    "damaged text": (chunk(b"tEXt", b"k\0text")[:-4] + bytes(4), False),
    "damaged resolution": (chunk(b"pHYs", b"\0"), False),
    "damaged gamma": (chunk(b"gAMA", b""), False),
    "an unknown chunk": (chunk(b"vpAg", b"123456789")[:-4] + bytes(4), False),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after the pixels"])
def test_what_is_written_beside_pixels_never_costs_them(name, after):
    beside, turned = LONG[name]
    image = Image.fromarray(random_pixels(2, 3))
    data = encoded(image, "PNG")
    place = len(data) - 12 if after else 33
    upright = image.transpose(Image.Transpose.ROTATE_270) if turned else image
    found = decode(data[:place] + beside + data[place:], max_pixels=LIMIT).pixels
    assert np.array_equal(found, np.asarray(upright).transpose(2, 0, 1))


def test_damaged_pixels_beside_long_texts_stay_damaged():
    data = encoded(Image.fromarray(random_pixels(16, 16)), "PNG")
    body = data.index(b"IDAT") + 20
    broken = data[:33] + LONG["compressed text"][0] + data[33:body] + bytes(4) + data[body + 4 :]
    with pytest.raises(UnreadableFileError, match="is damaged"):
        decode(broken, max_pixels=LIMIT)


def test_float_tiffs_in_the_unit_interval_are_read():
    data = encoded(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), "TIFF")
    assert decode(data, max_pixels=LIMIT).pixels[2].tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_transparency_lies_on_white(mode):
    base = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    base.putpixel((1, 0), (0, 0, 255, 0))
    if mode in ("RGBA", "LA", "PA"):
        data = encoded(base.convert(mode), "TIFF" if mode == "PA" else "PNG")
    else:
        flat = base.convert("RGB").convert(mode)
        data = encoded(flat, "PNG", transparency=flat.getpixel((1, 0)))
    decoded = decode(data, max_pixels=LIMIT)
    assert decoded.pixels[:, 0, 1].tolist() == [255, 255, 255]
    assert decoded.pixels[1, 0, 0] < 100
    assert decoded.notes == ("has transparency; it lies on white",)


def test_partial_transparency_is_mixed():
    data = encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 51)), "PNG")
    assert decode(data, max_pixels=LIMIT).pixels.flatten().tolist() == [204] * 3


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame_and_a_note(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    decoded = decode(data, max_pixels=LIMIT)
    assert decoded.pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert decoded.notes == ("is animated; the first of its 3 frames is used",)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_turns_images_upright(kind):
    image = Image.fromarray(random_pixels(32, 64))
    for tag, shape in ((1, (32, 64)), (3, (32, 64)), (6, (64, 32)), (8, (64, 32)), (99, (32, 64))):
        exif = image.getexif()
        exif[0x0112] = tag
        data = encoded(image, kind, exif=exif)
        assert decode(data, max_pixels=LIMIT).pixels.shape[1:] == shape
    data = encoded(image, "PNG", exif=b"Exif\0\0garbage that is no TIFF header")
    assert decode(data, max_pixels=LIMIT).pixels.shape[1:] == (32, 64)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_eight_bits(mode, channels):
    image = Image.fromarray(random_pixels())
    source = image.convert(mode)
    data = encoded(source, "TIFF")
    expected = np.asarray(source.convert("RGB").convert("RGB" if channels == 3 else "L"))
    pixels = decode(data, channels=channels, max_pixels=LIMIT).pixels
    assert pixels.shape == (channels, 24, 32)
    assert np.array_equal(pixels.transpose(1, 2, 0).squeeze(), expected)


def test_cmyk_uses_its_profile_and_survives_a_bad_one():
    image = Image.fromarray(random_pixels()).convert("CMYK")
    plain = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    for profile in (b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        data = encoded(image, "TIFF", icc_profile=profile)
        assert np.array_equal(decode(data, max_pixels=LIMIT).pixels, plain)


def test_the_content_decides_not_the_name(tmp_path):
    jpeg = encoded(Image.fromarray(random_pixels()), "JPEG")
    (tmp_path / "photo.png").write_bytes(jpeg)
    (tmp_path / "photo").write_bytes(jpeg)
    assert len(load_images(tmp_path)) == 2


def test_the_pixel_limit_is_the_users(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(random_pixels(10, 11)), "PNG"))
    assert len(load_images(tmp_path, max_pixels=110)) == 1
    with pytest.raises(UserError, match=r"11 x 10 pixels; the limit is 109 \(`max_pixels`\)"):
        load_images(tmp_path, max_pixels=109)


def test_notes_count_and_name_the_first(tmp_path):
    clear = encoded(Image.new("RGBA", (2, 2)), "PNG")
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(clear)
    assert load_images(tmp_path).notes == ("a.png (and 2 more) has transparency; it lies on white",)


# --- archives -------------------------------------------------------------------------------------------------------

GOOD = encoded(Image.fromarray(random_pixels()), "PNG")


def member(name: str, **fields) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("placeholder")
    info.filename = info.orig_filename = name
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def archive(*members: tuple[zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as target:
        for info, data in members:
            info.compress_type = compression
            target.writestr(info, data)
    return buffer.getvalue()


def with_flag(data: bytes, flag: int) -> bytes:
    """Sets a flag bit in the first local header and the first central entry."""
    changed = bytearray(data)
    for start, offset in ((data.index(b"PK\x03\x04"), 6), (data.index(b"PK\x01\x02"), 8)):
        changed[start + offset] |= flag
    return bytes(changed)


def with_size(data: bytes, size: int) -> bytes:
    """Lies about the uncompressed size in the central directory."""
    start = data.index(b"PK\x01\x02")
    return data[: start + 24] + struct.pack("<I", size) + data[start + 28 :]


PATHS = [
    "../up.png",
    "a/../../up.png",
    "/etc/up.png",
    "//server/share/up.png",
    "C:/up.png",
    "c:up.png",
    "..\\up.png",
    "a\\b.png",
    "\\\\server\\up.png",
    "./up.png",
    "a//b.png",
    "a/./b.png",
    "..",
    "a/..",
]


def hostile_archives() -> Iterator[tuple[str, bytes, str]]:
    """Archives that must be refused as a whole: name, bytes, and a part of the message."""
    for path in PATHS:
        yield f"path {path}", archive((member("ok.png"), GOOD), (member(path), GOOD)), "leads elsewhere"
    folder = archive((member("ok.png"), GOOD), (member("../up/"), b""))
    yield "folder that leads up", folder, "leads elsewhere"
    nul = archive((member("aX.png"), GOOD)).replace(b"aX.png", b"a\0.png")
    yield "NUL in a name", nul, "leads elsewhere"
    yield "symbolic link", archive((member("link.png", external_attr=0o120777 << 16), b"a.png")), "is a link"
    yield "encrypted", with_flag(archive((member("a.png"), GOOD)), 1), "member 'a.png' is encrypted; repack"
    twice = archive((member("a.png"), GOOD), (member("b.png"), GOOD)).replace(b"b.png", b"a.png")
    yield "two members of one name", twice, "appears twice"
    zeros = archive((member("zeros.png"), bytes(11 * 2**20)), compression=zipfile.ZIP_DEFLATED)
    yield "ratio", zeros, "grows more than 200 times"
    yield "size", with_size(archive((member("a.png"), GOOD)), 2**28 + 1), "the limit is"
    for name, compression in (("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA)):
        yield name, archive((member("a.png"), GOOD), compression=compression), "another method"
    yield "no members", archive(), "is empty"
    yield "hidden members alone", archive((member(".a.png"), GOOD), (member("__MACOSX/a.png"), GOOD)), "is empty"
    whole = archive((member("a.png"), GOOD))
    yield "directory cut off", whole[:-30], "neither a folder nor a zip"
    middle = whole.index(b"PK\x01\x02")
    yield "directory overwritten", whole[:middle] + b"XXXX" + whole[middle + 4 :], "is damaged"
    yield "terminal codes", archive((member("\x1b[31m/../x.png"), GOOD)), r"\\x1b"


HOSTILE = {name: (data, message) for name, data, message in hostile_archives()}


def damaged_archives() -> Iterator[tuple[str, bytes]]:
    """Archives with one good member and one that fails when it is read."""
    good = (member("good.png"), GOOD)
    data = archive((member("bad.png"), GOOD), good)
    yield "content changed", data.replace(GOOD[40:48], bytes(8), 1)
    yield "size too small", with_size(archive((member("bad.png"), GOOD), good, compression=8), 100)
    yield "names differ", data.replace(b"bad.png", b"bed.png", 1)
    yield "archive in the archive", archive((member("bad.png"), archive((member("x.png"), GOOD))), good)


DAMAGED = dict(damaged_archives())


def test_there_are_twenty_five_archives():
    assert len(HOSTILE) + len(DAMAGED) >= 25


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(tmp_path, name):
    data, message = HOSTILE[name]
    path = tmp_path / "set.zip"
    path.write_bytes(data)
    before = listing(tmp_path.parent)
    with sentinel(tmp_path) as events, pytest.raises(UserError, match=message) as caught:
        load_images(path)
    assert events == []
    assert listing(tmp_path.parent) == before
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_members_are_skipped(tmp_path, name):
    path = tmp_path / "set.zip"
    path.write_bytes(DAMAGED[name])
    with sentinel(tmp_path) as events:
        loaded = load_images(path)
    assert events == []
    assert sorted(tmp_path.rglob("*")) == [path]
    assert loaded.names == ("good.png",)
    assert [skipped for skipped, _ in loaded.skipped] == ["bad.png"]


@pytest.mark.parametrize(
    ("limit", "value", "make", "message"),
    [
        (
            "MAX_MEMBERS",
            1,
            lambda: archive((member("a.png"), GOOD), (member("b.png"), GOOD)),
            "2 members; the limit is 1",
        ),
        ("MAX_BYTES", 100, lambda: archive((member("a.png"), GOOD)), "the limit is 100"),
    ],
)
def test_limits_of_number_and_size(tmp_path, monkeypatch, limit, value, make: Callable[[], bytes], message):
    path = Path(tmp_path) / "set.zip"
    path.write_bytes(make())
    assert len(load_images(path)) > 0
    monkeypatch.setattr(files_module, limit, value)
    with pytest.raises(UserError, match=message):
        load_images(path)


def test_large_files_of_a_folder_are_skipped(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(GOOD)
    (tmp_path / "b.png").write_bytes(GOOD + bytes(5000))
    monkeypatch.setattr(files_module, "MAX_BYTES", len(GOOD))
    loaded = load_images(tmp_path)
    assert loaded.names == ("a.png",)
    assert "bytes; the limit is" in loaded.skipped[0][1]
