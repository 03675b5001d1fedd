"""Two hundred requests that a service must refuse, each with the status that it must answer."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

BODY = 300_000
"""The limit of a request's bytes that the list is made for."""
PIXELS = 50_000
"""The limit of a picture's pixels."""
ROWS = 24
"""Rows of the store."""
EDGE = b"edge-of-a-part"
FORM = {"Content-Type": f"multipart/form-data; boundary={EDGE.decode()}"}


def encoded(size=(8, 16), kind="PNG", mode="RGB"):
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(stream, kind)
    return stream.getvalue()


def form(image=None, **fields):
    """A multipart body; a list is a field that is given several times."""
    parts = []
    for name, value in fields.items():
        for each in value if isinstance(value, list) else [value]:
            each = each if isinstance(each, bytes) else str(each).encode()
            parts.append(b'Content-Disposition: form-data; name="' + name.encode() + b'"\r\n\r\n' + each)
    if image is not None:
        head = b'Content-Disposition: form-data; name="image"; filename="a"\r\nContent-Type: image/png\r\n\r\n'
        parts.append(head + image)
    return b"".join(b"--" + EDGE + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + EDGE + b"--\r\n"


def bomb(width, height):
    """A PNG file of a few hundred bytes that says it has so many pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(500))) + chunk(b"IEND", b"")


def animation():
    stream = io.BytesIO()
    frames = [Image.fromarray(np.full((8, 8, 3), shade, np.uint8)) for shade in (0, 99, 255)]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def requests(token):
    """Return (name, method, path, headers, body, statuses) of every request."""
    good, auth = encoded(), {"Authorization": f"Bearer {token}"}
    found = []

    def add(name, method, path, headers, body, *statuses):
        found.append((name, method, path, headers, body, statuses))

    def search(name, body, *statuses):
        add(name, "POST", "/api/search", FORM, body, *statuses)

    # pictures
    jpeg, tiff = encoded(kind="JPEG"), encoded(kind="TIFF")
    no_pictures = {
        "nothing": b"",
        "text": b"hello",
        "html": b"<html><script>alert(1)</script></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "svg with an entity": b'<!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>',
        "a program": b"\x7fELF" + bytes(200),
        "a script": b"#!/bin/sh\nreboot\n",
        "an archive": b"PK\x03\x04" + bytes(100),
        "a pickle": b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
        "postscript": b"%!PS-Adobe-3.0\n(/etc/passwd) (r) file\n",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "pdf": b"%PDF-1.4\n1 0 obj\n",
        "zeros": bytes(5000),
        "noise": np.random.default_rng(1).bytes(5000),
        "a path": b"/etc/passwd",
        "an address": b"http://127.0.0.1/secret.png",
        "mvg": b"push graphic-context\nimage over 0,0 0,0 'url(http://127.0.0.1/)'\n",
        "xpm": b"/* XPM */\nstatic char * a[] = {\n",
        "an animation": animation(),
        "png signature alone": good[:8],
        "jpeg signature alone": jpeg[:3],
        "tiff signature alone": tiff[:4],
        "webp signature alone": b"RIFF\x00\x00\x00\x00WEBP",
        "gif header alone": b"GIF89a",
        "bmp header alone": b"BM" + bytes(20),
        "fits": b"SIMPLE  =                    T" + bytes(2880),
        "psd": b"8BPS\x00\x01" + bytes(60),
        "ico": b"\x00\x00\x01\x00\x01\x00" + bytes(40),
        "an avif of zeros": b"\x00\x00\x00\x1cftypavif" + bytes(200),
        "a jpeg 2000 of zeros": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(200),
    }
    for name, data in no_pictures.items():
        search(f"picture: {name}", form(data), 415)
    for cut in (20, 40, 60, len(good) // 2, len(good) - 40):
        search(f"picture: png cut at {cut}", form(good[:cut]), 415)
    for cut in (20, 100, 200, len(jpeg) // 2):
        search(f"picture: jpeg cut at {cut}", form(jpeg[:cut]), 415)
    for cut in (9, len(tiff) // 2):
        search(f"picture: tiff cut at {cut}", form(tiff[:cut]), 415)
    for place in (17, 21, 27, 45):
        search(f"picture: png with byte {place} changed", form(good[:place] + b"\xf7" + good[place + 1 :]), 415, 413)
    for size in ((300, 300), (50_001, 1), (1, 50_001), (40_000, 40_000), (2**31 - 1, 2**31 - 1), (65_535, 65_535)):
        search(f"pixels: {size}", form(bomb(*size)), 413)
    search("pixels: jpeg", form(encoded((400, 200), "JPEG")), 413)
    search("pixels: webp", form(encoded((400, 200), "WEBP")), 413)
    search("pixels: gif", form(encoded((400, 200), "GIF", "P")), 413)
    search("picture: none", form(k=3), 422)
    search("picture: a field of text", form(kept="x").replace(b'"kept"', b'"image"'), 422)
    stream = io.BytesIO()
    Image.fromarray(np.full((16, 8), 40_000, np.uint16)).save(stream, "PNG")
    search("picture: 16 bits", form(stream.getvalue()), 415)

    # parameters
    for name, values in {
        "k": ["0", "-1", "201", "x", "1e9", "9" * 40, "1.5", "NaN", "١"],
        "rerank": ["-1", "2001", "x", "1.5", "9" * 400],
        "by": ["", "nothing", "../rerank", "rerank;", "a" * 300],
        "relations": ["maybe", "2", "yes please"],
        "threshold": ["x", "nan", "inf", "-inf", "1e999"],
        "since": ["yesterday", "2024-13-01", "9" * 30, "0000-00-00", "a" * 300, "99999-01-01"],
        "until": ["x", "2024-02-30T00:00", "'; DROP TABLE images"],
        "box": ["", "1,2,3", "1,2,3,4,5", "a,b,c,d", "0,0,0,0", "4,4,2,2", "nan,0,1,1", "inf,0,1,1", "100,100,200,200"]
        + ["-9,-9,-1,-1", "1e9,0,1,1", "0,0,8", "0 0 8 8", "0,0,8,8;", "1.2.3,0,8,8", "9" * 50 + ",0,8,8", "[0,0,8,8]"],
        "cameras": [["c"] * 101],
        "labels": [["1"] * 101],
        "camera": ["c" * 300],
    }.items():
        for value in values:
            more = {"rerank": "5"} if name == "by" else {}
            shown = str(value)[:30]
            if name == "by" and not value or name == "box" and not value:
                continue  # an empty field is one that was not filled in
            search(f"{name}: {shown}", form(good, **more, **{name: value}), 422)
    search("relations: none here", form(good, relations="true"), 422)
    search("re-ranking by unknown cameras", form(good, rerank=5, by="cajaccard"), 422)

    # bodies
    search("body: too large", form(good + bytes(BODY)), 413)
    search("body: a large field", form(good, camera="c" * BODY), 413)
    search("body: empty", b"", 422, 400)
    search("body: no part", b"--" + EDGE + b"--\r\n", 422, 400)
    search("body: another edge", form(good).replace(EDGE, b"another"), 400, 422)
    search("body: a part without a name", b"--" + EDGE + b"\r\n\r\nx\r\n--" + EDGE + b"--\r\n", 400, 422)
    search("body: cut", form(good)[:-80], 400, 415, 422)
    search("body: many parts", form(good, **{f"f{number}": "x" for number in range(2000)}), 400)
    for kind in ("application/json", "text/plain", "application/xml", "multipart/form-data", "image/png", "x" * 200):
        add(f"body: {kind[:30]}", "POST", "/api/search", {"Content-Type": kind}, form(good), 400, 422)
    add("body: claims to be large", "POST", "/api/search", {**FORM, "Content-Length": str(10**12)}, b"", 413)
    add("body: of a negative size", "POST", "/api/search", {**FORM, "Content-Length": "-5"}, b"", 400)
    add("body: of two sizes", "POST", "/api/search", {**FORM, "Content-Length": "5, 6"}, b"", 400)

    # rows and paths
    for row in (ROWS, ROWS + 1, 10**9, 2**62):
        add(f"row {row}", "GET", f"/api/images/{row}", {}, b"", 404)
    for row in ("-1", "x", "1.5", "2e1", str(2**63), "9" * 100, "%00", "0x1", "1%20OR%201=1", "1;2", "%C2%B9", "null"):
        add(f"row {row[:20]}", "GET", f"/api/images/{row}", {}, b"", 422, 400)
    for side in ("0", "31", "1025", "-5", "x", "9" * 30, "1e3"):
        add(f"side {side}", "GET", f"/api/images/0?side={side}", {}, b"", 422)
    for path in (
        "/api/images/../../../../etc/passwd",
        "/api/images/..%2f..%2f..%2fetc%2fpasswd",
        "/api/images/%2e%2e/%2e%2e/etc/passwd",
        "/api/images/....//....//etc/passwd",
        "/api/images//etc/passwd",
        "/api/images/0/../1",
        "/api/images/0%00.png",
        "/api/images/file:///etc/passwd",
        "/../etc/passwd",
        "/..%5c..%5cwindows%5cwin.ini",
        "//etc/passwd",
        "/store.json",
        "/serve/feedback.jsonl",
        "/serve/enrolled/a.png",
        "/gallery/store.json",
        "/page.html",
        "/.git/config",
        "/.env",
        "/docs",
        "/redoc",
        "/static/",
        "/admin",
        "/api",
        "/api/",
        "/api/search/../images",
        "/api/images",
        "/api/feedback",
        "/cgi-bin/test",
        "/" + "a" * 2000,
        "/?/../../etc/passwd".replace("?", "%3f"),
    ):
        add(f"path {path[:40]}", "GET", path, {}, b"", 404, 405, 422)

    # methods
    for method, path in (
        ("GET", "/api/search"),
        ("PUT", "/api/search"),
        ("PATCH", "/api/images/0"),
        ("PUT", "/api/images/0"),
        ("POST", "/api/images/0"),
        ("DELETE", "/api/images"),
        ("DELETE", "/"),
        ("POST", "/"),
        ("POST", "/health"),
        ("DELETE", "/metrics"),
        ("TRACE", "/"),
        ("OPTIONS", "/api/search"),
        ("PROPFIND", "/"),
    ):
        add(f"method {method} {path}", method, path, {}, b"", 405)

    # tokens
    wrong = ["", "Bearer", "Bearer ", f"Bearer {token[:-1]}", f"Bearer {token}x", f"Bearer {token.upper()}"]
    wrong += [f"Basic {token}", token, f"Bearer{token}", "Bearer null", "Bearer *", "Bearer ' OR 1=1"]
    wrong += ["Bearer \xff\xfe", "Bearer " + "a" * 5000]
    for value in wrong:
        headers = {"Authorization": value}
        add(f"token {value[:20]}", "DELETE", "/api/images/0", headers, b"", 401)
    for method, path, body in (
        ("POST", "/api/images", form(good)),
        ("POST", "/api/feedback", form(good, row=0, same="true")),
        ("GET", "/api/feedback.csv", b""),
        ("GET", f"/api/feedback.csv?token={token}", b""),
        ("DELETE", f"/api/images/0?token={token}", b""),
    ):
        add(f"no token: {method} {path[:30]}", method, path, FORM, body, 401)
    add("token in a cookie", "DELETE", "/api/images/0", {"Cookie": f"token={token}"}, b"", 401)

    # writes
    both = {**FORM, **auth}
    add("enrol: no picture", "POST", "/api/images", both, form(b"text"), 415)
    add("enrol: a label of control characters", "POST", "/api/images", both, form(good, label="a\x00b"), 422)
    add("enrol: a label of two lines", "POST", "/api/images", both, form(good, label="a\nb"), 422)
    add("enrol: a long label", "POST", "/api/images", both, form(good, label="a" * 300), 422)
    add("enrol: a time", "POST", "/api/images", both, form(good, time="soon"), 422)
    add("enrol: a bomb", "POST", "/api/images", both, form(bomb(50_000, 50_000)), 413)
    for row in (ROWS, 10**9):
        add(f"delete {row}", "DELETE", f"/api/images/{row}", auth, b"", 404)
        add(f"answer on {row}", "POST", "/api/feedback", both, form(good, row=row, same="true"), 404)
    for row, same in (("-1", "true"), ("x", "true"), ("0", "perhaps"), ("0", ""), ("", "true"), (str(2**70), "true")):
        add(f"answer {row} {same}", "POST", "/api/feedback", both, form(good, row=row, same=same), 422)
    for kind in ("json", "../training", "training/../..", "x" * 100):
        add(f"export {kind[:20]}", "GET", f"/api/feedback.csv?form={kind}", auth, b"", 422)

    # hosts, origins and headers
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost@evil.example", "[::1", ""):
        add(f"host {host}", "GET", "/api/store", {"Host": host}, b"", 421, 400)
    for origin in ("http://evil.example", "null", "http://localhost:1", "file://", "chrome-extension://abc"):
        add(f"origin {origin}", "POST", "/api/search", {**FORM, "Origin": origin}, form(good), 403)
    add("a large header", "GET", "/health", {"X-Large": "a" * 40_000}, b"", 400, 431)
    add("many headers", "GET", "/health", {f"X-{number}": "a" * 100 for number in range(400)}, b"", 400, 431)
    return found
