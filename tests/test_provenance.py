"""Marks: payloads, the watermarks in picture and sound after coding, manifests, and what `verify` says of a file."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wan_jax import provenance
from wan_jax.cli import main
from wan_jax.errors import InputError
from wan_jax.media import Clip, read_video
from wan_jax.provenance import Finding, audio, manifest, mark, sign, verify, video
from wan_jax.provenance.payload import FULL, MIN_EVIDENCE, PUBLIC_KEY, SMALL, Mark, Message, carriers, decode, encode

MODEL = "wan2.1-t2v-1.3b"
SETTINGS = {"model": MODEL, "prompt": "a cat", "seed": 3, "consent": {"given": True, "by": "the person shown"}}


def scene(height: int, width: int, num_frames: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with edges, a disc that moves, and a little texture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    phase, angle = rng.uniform(0, 6, (2, 3))
    still = 128 + 60 * np.sin(5 * (x[..., None] * np.cos(angle) + y[..., None] * np.sin(angle)) + phase)
    still += 8 * rng.standard_normal((height, width, 1)) * (x > 0.5)[..., None]
    frames = []
    for t in np.linspace(0, 1, num_frames):
        inside = (x - 0.3 - 0.3 * t) ** 2 + (y - 0.3) ** 2 < 0.02
        frames.append(np.where(inside[..., None], (200, 60, 40), still))
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def voice(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """Harmonics of a gliding pitch under moving formants, in syllables; hiss between them."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * t + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    sound = np.zeros_like(t)
    for k in range(1, 40):
        formants = (600 + 200 * np.sin(3 * t), 1400 + 400 * np.sin(2 * t), 2700.0)
        level = sum(np.exp(-(((k * pitch - f) / 180) ** 2)) for f in formants) + 0.02
        sound += level / k**0.5 * np.sin(k * phase) * (k * pitch < 0.45 * rate)
    sound *= np.clip(np.sin(2 * np.pi * 3 * t), 0, 1)
    return (0.2 * sound / np.abs(sound).max() + 0.002 * rng.standard_normal(len(t))).astype(np.float32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


# ---- payloads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [FULL, SMALL])
def test_payload(layout):
    message = Message.of(layout, MODEL, SETTINGS)
    signs = encode(message, layout)
    assert len(signs) == layout.bits and decode(signs, layout) == message
    for bit in range(layout.bits):  # a check of this length finds every single and double error
        for other in range(bit, layout.bits):
            wrong = signs.copy()
            wrong[[bit, other]] *= -1
            assert decode(wrong, layout) is None


def test_the_weakest_bits_are_guessed():
    message = Message.of(FULL, MODEL, SETTINGS)
    signs = encode(message, FULL)
    signs[[3, 40, 63]] *= -0.1
    assert Mark(FULL, signs, 20.0).message == message
    assert Mark(FULL, signs, MIN_EVIDENCE - 1).message is None
    signs[7] *= -1  # wrong, and as strong as the others
    assert Mark(FULL, signs, 20.0).message is None


def test_the_small_check_fails_for_chance():
    signs = np.random.default_rng(0).standard_normal((4096, SMALL.bits))
    passed = sum(decode(one, SMALL) is not None for one in signs)
    assert 4 <= passed <= 32  # 1 in 256


def test_carriers_are_orthogonal_and_keyed():
    ours, theirs = carriers("a", "picture", 64, 1024), carriers("b", "picture", 64, 1024)
    np.testing.assert_array_equal(ours @ ours.T, 1024 * np.eye(64))
    assert np.abs(ours @ theirs.T).max() < 6 * 32
    assert provenance.payload.evidence(64 / 1024, 64, 1024) < 1 < 15 < provenance.payload.evidence(0.2, 64, 1024)


# ---- picture -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def marked() -> Clip:
    return mark(Clip(scene(256, 384, 13), 16, settings=SETTINGS), model=MODEL)


def test_mark_is_faint_and_the_same_again(marked):
    plain = Clip(scene(256, 384, 13), 16, settings=SETTINGS)
    assert 41 <= psnr(plain.video, marked.video) < 50
    again = mark(plain, model=MODEL)
    np.testing.assert_array_equal(again.video, marked.video)
    assert again.settings == marked.settings
    other = mark(plain, model=MODEL, key="mine")
    assert (other.video != marked.video).any() and "mine" not in json.dumps(other.settings)
    with pytest.raises(InputError, match="once"):
        mark(marked, model=MODEL)


def test_floating_and_sharded_frames():
    frames = scene(96, 128, 8)
    tile = video.tile(PUBLIC_KEY, np.ones(SMALL.bits, np.float32), SMALL)
    whole = np.asarray(video.watermark(frames, tile, 2))
    unit = video.watermark(frames.astype(np.float32) / 127.5 - 1, tile, 2)
    assert np.abs((np.asarray(unit) + 1) * 127.5 - whole).max() < 0.51
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    placed = jax.device_put(frames, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_array_equal(np.asarray(video.watermark(placed, tile, 2)), whole)


def test_read_after_coding_scaling_and_cutting(marked, tmp_path):
    message = Message.of(FULL, MODEL, SETTINGS)
    assert video.detect(marked.video, PUBLIC_KEY, search=False).message == message
    coded = read_video(marked.save(tmp_path / "clip.mp4", crf=23)).video
    assert video.detect(coded, PUBLIC_KEY).message == message
    assert video.detect(coded[5:, 13:-11, 21:-30], PUBLIC_KEY, search=False).message == message
    scaled = jax.image.resize(coded.astype(np.float32), (len(coded), 320, 480, 3), "cubic")
    assert video.detect(np.clip(scaled, 0, 255).astype(np.uint8), PUBLIC_KEY).message == message


def test_wrong_key_and_unmarked(marked):
    wrong = video.detect(marked.video, "other", search=False)
    unmarked = video.detect(scene(256, 384, 13), PUBLIC_KEY)
    for found in (wrong, unmarked):
        assert found.message is None and found.evidence < MIN_EVIDENCE


@pytest.mark.parametrize(("height", "width", "num_frames"), [(96, 128, 17), (96, 96, 49), (64, 64, 32)])
def test_small_clips(height, width, num_frames, tmp_path):
    for seed in range(2):
        clip = mark(Clip(scene(height, width, num_frames, seed), 16, settings=SETTINGS), model=MODEL)
        assert psnr(scene(height, width, num_frames, seed), clip.video) >= 39.5
        record = clip.settings["provenance"]["picture"]
        assert record["bits"] == 16 and "no hash" in record["note"]
        coded = read_video(clip.save(tmp_path / "small.mp4"))
        assert video.detect(coded.video, PUBLIC_KEY).message == Message.of(SMALL, MODEL, {})


def test_what_carries_nothing_says_so():
    tiny = Clip(scene(24, 40, 2), 16, audio=voice(1.0, 16000), sample_rate=16000)
    record = mark(tiny, model=MODEL).settings["provenance"]
    assert record["picture"]["bits"] == 0 and "32 pixels" in record["picture"]["note"]
    assert record["sound"]["bits"] == 0 and "1.5 s" in record["sound"]["note"]
    silent = Clip(np.zeros((2, 64, 64, 3), np.uint8), 16, audio=np.zeros(32000, np.float32), sample_rate=16000)
    record = mark(silent, model=MODEL).settings["provenance"]
    assert record["sound"]["bits"] == 0 and "read back" in record["sound"]["note"]


def test_badge_is_visible_in_its_corner():
    plain = Clip(scene(96, 128, 2), 16)
    change = np.abs(mark(plain, model=MODEL, badge=True).video.astype(int) - plain.video).max((0, 3))
    assert change[-11:, -16:].max() > 60 and change[:80].max() < 30


# ---- sound -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16000, 48000])
def test_sound_after_aac(rate, tmp_path):
    samples = voice(3.5, rate)
    stereo = np.stack([samples, 0.5 * samples], axis=1)
    clip = Clip(scene(64, 64, 56), 16, audio=stereo, sample_rate=rate)
    marked = mark(clip, model=MODEL)
    assert 25 <= 10 * np.log10(np.sum(stereo**2) / np.sum((marked.audio - stereo) ** 2)) < 50
    np.testing.assert_array_equal(mark(clip, model=MODEL).audio, marked.audio)
    message = Message.of(SMALL, MODEL, {})
    coded = read_video(marked.save(tmp_path / "clip.mp4"))
    assert audio.detect(coded.audio, rate, PUBLIC_KEY).message == message
    assert audio.detect(coded.audio[rate // 2 :], rate, PUBLIC_KEY).message == message
    assert audio.detect(coded.audio, rate, "other").message is None
    assert audio.detect(stereo, rate, PUBLIC_KEY).message is None
    if rate == 48000:  # every third sample after a crude low pass: 16 kHz
        low = np.convolve(marked.audio[:, 0], np.ones(3) / 3, "same")[::3]
        assert audio.detect(low, 16000, PUBLIC_KEY).message == message


def test_short_sound_says_so():
    clip = Clip(scene(64, 64, 32), 16, audio=voice(2.0, 16000), sample_rate=16000)
    record = mark(clip, model=MODEL).settings["provenance"]["sound"]
    assert record["bits"] == 16 and "2.0 s" in record["note"]


# ---- manifests and reports ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def identity(tmp_path_factory) -> Path:
    """A folder with a certificate authority made for this run, and a signer's chain and key."""
    pytest.importorskip("c2pa")
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder, keys = tmp_path_factory.mktemp("identity"), {}

    def certificate(name: str, issuer: str, authority: bool):
        keys[name] = ec.generate_private_key(ec.SECP256R1())
        subject, by = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in (name, issuer))
        organisation = x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Test")
        subject, by = (x509.Name([organisation, *n]) for n in (subject, by))
        begin = datetime.datetime(2026, 1, 1)
        usage = dict.fromkeys(
            "content_commitment key_encipherment data_encipherment key_agreement encipher_only decipher_only".split(),
            False,
        )
        builder = (
            x509.CertificateBuilder(by, subject, keys[name].public_key(), x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + datetime.timedelta(days=36500))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **usage),
                critical=True,
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[issuer].public_key()), False)
        )
        if not authority:
            purpose = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(purpose, critical=False)
        return builder.sign(keys[issuer], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    root, leaf = certificate("root", "root", True), certificate("signer", "root", False)
    (folder / "root.pem").write_bytes(root)
    (folder / "chain.pem").write_bytes(leaf + root)
    plain = serialization.NoEncryption()
    private = keys["signer"].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key.pem").write_bytes(private)
    return folder


def test_unsigned_file(marked, tmp_path):
    path = marked.save(tmp_path / "clip.mp4")
    report = verify(path)
    assert report.manifest.state in ("absent", "not checked") and not report.problems
    assert report.picture.found and report.picture.settings_match and report.picture.models == [MODEL]
    assert report.settings == json.loads(json.dumps(marked.settings)) and report.consent == SETTINGS["consent"]
    changed = dataclasses.replace(marked, settings={**marked.settings, "seed": 4})
    assert verify(changed.save(path)).picture.settings_match is False
    with pytest.raises(InputError, match="missing"):
        verify(tmp_path / "no.mp4")


def test_signed_file(marked, identity, tmp_path):
    path = marked.save(tmp_path / "clip.mp4")
    assert verify(path).manifest.state == "absent"
    sign(path, certificate=identity / "chain.pem", private_key=identity / "key.pem")
    assert manifest.read(path).state == "valid, untrusted signer"
    report = verify(path, trust=identity / "root.pem")
    assert report.manifest.state == "trusted" and report.manifest.signer == "signer"
    assert report.picture.found and report.consent == SETTINGS["consent"]
    claims = report.manifest.claims
    assert claims["model"] == MODEL and "prompt" not in claims and len(claims["prompt_sha256"]) == 64
    assert claims["watermark"]["picture"]["payload"] == report.picture.payload
    content = bytearray(path.read_bytes())
    assert b"trainedAlgorithmicMedia" in content and b"c2pa.created" in content and b"c2pa.soft-binding" in content
    box = content.index(b"uuid") - 4  # the manifest; some of it is padding, which is not signed
    end = box + int.from_bytes(content[box : box + 4], "big")
    for place in np.random.default_rng(0).integers(end, len(content), 40):
        content[place] ^= 1
        path.write_bytes(content)
        content[place] ^= 1
        assert manifest.read(path, identity / "root.pem").state == "tampered", place
    assert verify(path).manifest.state == "tampered"


def test_signing_by_callback_and_prompt(identity, tmp_path):
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = serialization.load_pem_private_key((identity / "key.pem").read_bytes(), None)
    path = Clip(scene(64, 64, 1), 16, settings=SETTINGS).save(tmp_path / "picture.png")
    chain = identity / "chain.pem"
    sign(path, certificate=chain, private_key=lambda data: key.sign(data, ec.ECDSA(hashes.SHA256())), embed_prompt=True)
    found = manifest.read(path, identity / "root.pem")
    assert found.state == "trusted" and found.claims["prompt"] == "a cat"
    before = path.read_bytes()
    with pytest.raises(InputError, match="certificate"):
        sign(path, certificate=identity / "key.pem", private_key=identity / "key.pem")
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError, match="PEM"):
        manifest.read(path, tmp_path / "picture.png")


def test_command(marked, tmp_path, capsys):
    path = marked.save(tmp_path / "clip.mp4")
    assert main(["verify", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["picture"]["found"] and report["sound"] is None
    assert main(["verify", str(path), "--watermark-key", "other"]) == 0
    said = capsys.readouterr().out
    assert "no watermark" in said and "the person shown" in said
    (tmp_path / "broken.mp4").write_bytes(path.read_bytes()[:3000])
    assert main(["verify", str(tmp_path / "broken.mp4")]) == 0
    assert "problem" in capsys.readouterr().out


def test_generate_marks_and_signs(identity, tiny_folder, tmp_path, capsys):
    """From the command to the report: a tiny model, a signed file, and one byte changed in it."""
    path, trust = tmp_path / "clip.mp4", ["--trust", str(identity / "root.pem"), "--json"]
    words = ["generate", "--model", str(tiny_folder("t2v")), "--prompt", "a cat", "--size", "64x64"]
    words += ["--num-frames", "9", "--num-steps", "2", "--quiet", "--output", str(path)]
    words += ["--c2pa-cert", str(identity / "chain.pem")]
    assert main(words) == 2 and "needs both" in capsys.readouterr().err
    assert main([*words, "--c2pa-key", str(identity / "key.pem")]) == 0
    capsys.readouterr()
    assert main(["verify", str(path), *trust]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["manifest"]["state"] == "trusted" and "prompt" not in report["manifest"]["claims"]
    assert report["settings"]["provenance"]["picture"]["payload"] == report["picture"]["payload"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["verify", str(path), *trust]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["state"] == "tampered"


def test_report_is_escaped():
    hostile = provenance.Report("x", manifest.Manifest("trusted", "a\x1b[2Jb"), None, None, {"a": "\x1b"}, None, [])
    assert "\x1b" not in str(hostile)
    assert "DOES NOT FIT" in str(Finding(True, 64, 50.0, "00", [MODEL], False))
