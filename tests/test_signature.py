"""Signatures: their text, the roles of axes, and muP classes."""

import pytest

from flm_jax.signature import Role, Signature

TEXTS = [
    "embed",
    "vocab -> embed",
    "layers: embed -> heads head_dim",
    "layers: mlp -> embed",
    "embed -> vocab",
    "layers: -> kv_heads head_dim*",
]


@pytest.mark.parametrize("text", TEXTS)
def test_parse_and_print_are_inverse(text):
    assert str(Signature.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embed -> width", "unknown axis 'width'; known axes are embed, heads"),
        ("a: embed", "only 'layers' may stand before a colon"),
        ("embed -> mlp -> embed", "expected 'reads -> writes'"),
        ("embed ->", "expected 'reads -> writes'"),
        ("->", "expected 'reads -> writes'"),
        ("layers -> embed", "unknown axis 'layers'"),
    ],
)
def test_what_cannot_be_parsed_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Signature.parse(text)


def test_roles_and_muP_classes():
    query, out = (
        Signature.parse("layers: embed -> heads head_dim"),
        Signature.parse("layers: heads head_dim -> embed"),
    )
    assert (query.role("embed"), query.role("heads"), query.role("layers")) == (
        Role.READER,
        Role.WRITER,
        Role.READER,
    )
    assert (out.role("heads"), out.role("embed"), out.role("layers")) == (
        Role.READER,
        Role.WRITER,
        Role.WRITER,
    )
    assert Signature.parse("embed").role("embed") is Role.GAIN
    classes = {text: Signature.parse(text).is_matrix_like for text in TEXTS}
    assert [text for text, matrix in classes.items() if matrix] == [TEXTS[2], TEXTS[3]]
