"""The C2PA manifest: a signed statement inside the file of what made it (https://c2pa.org, specification 2).

It says ``c2pa.created`` with the source type ``trainedAlgorithmicMedia``, and repeats the model, the hash of the
settings, the payloads of the watermarks (soft binding) and the record of consent. Needs the extra ``c2pa``.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wan_jax
from wan_jax.errors import InputError
from wan_jax.media import read_settings

ASSERTION = "org.wan_jax.generation"
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
SOFT_BINDING = "org.wan_jax.watermark.1"  # an own name: not in C2PA's list of algorithms
CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


@dataclass(frozen=True)
class Manifest:
    """What `read` found. ``state``: ``trusted``, ``valid, untrusted signer``, ``tampered``, ``absent``, or ``not
    checked`` without c2pa-python; ``claims`` is what the manifest says about the generation."""

    state: str
    signer: str | None = None
    reasons: list[str] = field(default_factory=list)
    claims: dict[str, Any] = field(default_factory=dict)


def sign(
    path: str | Path,
    *,
    certificate: str | Path,
    private_key: str | Path | Callable[[bytes], bytes],
    embed_prompt: bool = False,
) -> Path:
    """Sign a file that `wan_jax.media.save` wrote; it is replaced in one step.

    Args:
        certificate: PEM file, the signer's certificate first, then its chain.
        private_key: PEM file (PKCS #8), or a function from bytes to their signature, so that the key can stay in a
            key store; ECDSA signatures as DER.
        embed_prompt: say the prompt itself; otherwise only its SHA-256.

    Raises:
        InputError: c2pa-python is missing, or file, settings, certificate or key cannot be used.
    """
    c2pa = _import_c2pa()
    path, settings = Path(path), read_settings(path)
    try:
        chain = Path(certificate).read_bytes()
        algorithm = getattr(c2pa.C2paSigningAlg, _algorithm(chain))
        if callable(private_key):
            signer = c2pa.Signer.from_callback(private_key, algorithm, chain.decode("ascii"))
        else:
            info = c2pa.C2paSignerInfo(algorithm, chain, Path(private_key).read_bytes(), None)
            signer = c2pa.Signer.from_info(info)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".wan_jax-") as folder:
            signed = Path(folder, path.name)
            with signer, c2pa.Builder(json.dumps(_statement(path, settings, embed_prompt))) as builder:
                builder.sign_file(path, signed, signer)
            signed.replace(path)
    except (OSError, ValueError, c2pa.C2paError) as error:
        raise InputError(f"could not sign {path}, check certificate and key: {error}") from error
    return path


def read(path: str | Path, trust: str | Path | None = None) -> Manifest:
    """Check the manifest of a file against its bytes.

    Args:
        trust: PEM file of the certificate authorities to trust. Without it no signer is trusted.

    Raises:
        InputError: ``trust`` cannot be used.
    """
    try:
        c2pa = _import_c2pa()
    except InputError as error:
        return Manifest("not checked", reasons=[str(error)])
    try:
        anchors = {"trust": {"user_anchors": Path(trust).read_text("ascii")}} if trust else {}
        context = c2pa.Context(c2pa.Settings.from_dict(anchors | {"verify": {"verify_trust": True}}))
    except (OSError, ValueError, c2pa.C2paError) as error:
        raise InputError(f"{trust} does not hold certificates in PEM: {error}") from error
    try:
        with c2pa.Reader(path, context=context) as reader:
            store, state = json.loads(reader.json()), reader.get_validation_state()
    except (c2pa.C2paError.ManifestNotFound, c2pa.C2paError.NotSupported):
        return Manifest("absent")
    except (ValueError, c2pa.C2paError) as error:  # a manifest is there, but does not even parse
        return Manifest("tampered", reasons=[str(error)])
    active = store.get("manifests", {}).get(store.get("active_manifest"), {})  # a damaged store may name another
    signature = active.get("signature_info", {})
    claims = [a["data"] for a in active.get("assertions", []) if a["label"] == ASSERTION]
    failures = store.get("validation_results", {}).get("activeManifest", {}).get("failure", [])
    return Manifest(
        {"Trusted": "trusted", "Valid": "valid, untrusted signer"}.get(state, "tampered"),
        signer=signature.get("common_name") or signature.get("issuer"),
        reasons=[failure["code"] for failure in failures],
        claims=claims[0] if claims else {},
    )


def _import_c2pa() -> Any:
    try:
        import c2pa
    except ImportError as error:
        raise InputError("manifests need c2pa-python: pip install 'wan_jax[c2pa]'") from error
    return c2pa


def _algorithm(chain: bytes) -> str:
    """The name of the signature algorithm that fits the first certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    match x509.load_pem_x509_certificates(chain)[0].public_key():
        case ec.EllipticCurvePublicKey() as key if key.curve.name in CURVES:
            return CURVES[key.curve.name]
        case rsa.RSAPublicKey():
            return "PS256"
        case ed25519.Ed25519PublicKey():
            return "ED25519"
    raise ValueError(f"its kind of key is none of {', '.join(CURVES)}, RSA, Ed25519")


def _statement(path: Path, settings: dict[str, Any], embed_prompt: bool) -> dict[str, Any]:
    """The manifest to be signed, as c2pa-python takes it."""
    marks = settings.get("provenance", {})
    agent = {"name": "wan_jax", "version": wan_jax.__version__}
    generation = {name: marks.get(name) for name in ("model", "settings_sha256")}
    generation |= {"watermark": {name: marks.get(name) for name in ("picture", "sound")}}
    generation |= {"consent": settings.get("consent")}
    if prompt := settings.get("prompt"):
        generation |= {"prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest()}
        generation |= {"prompt": prompt} if embed_prompt else {}
    created = {"action": "c2pa.created", "softwareAgent": agent, "digitalSourceType": SOURCE_TYPE}
    blocks = [
        {"scope": {"extent": name}, "value": mark["payload"]}
        for name in ("picture", "sound")
        if (mark := marks.get(name)) and mark.get("payload")
    ]
    assertions = [
        {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
        {"label": ASSERTION, "data": generation},
    ]
    if blocks:
        assertions.append({"label": "c2pa.soft-binding", "data": {"alg": SOFT_BINDING, "blocks": blocks}})
    return {"claim_generator_info": [agent], "title": path.name, "assertions": assertions}
