"""Each instruction against numpy, on drawn numbers and on awkward ones."""

import re

import numpy as np
import pytest
import torch
from one_program import execute

from minimind_fast.proof.ptx.formats import from_bf16, to_bf16, to_tf32
from minimind_fast.proof.ptx.parse import UnknownPtx

RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, 1 << 32, (64, 4), dtype=np.uint32)
WORDS[:8, 0] = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 31, 32, 33]
WORDS[:8, 1] = [0xFFFFFFFF, 0x80000000, 1, 0xFFFFFFFF, 32, 64, 5, 0]
FLOATS = RNG.standard_normal((64, 4)).astype(np.float32) * 10
FLOATS[:8, 0] = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-42, 3e38, 65520.0]
FLOATS[:8, 1] = [1.0, np.inf, 2.0, np.nan, 0.0, 1.0, 3e38, -1.0]
A, B, C, _ = (WORDS[:, i] for i in range(4))
SA, SB, SC, _ = (WORDS.view(np.int32)[:, i] for i in range(4))
FA, FB, FC, _ = (FLOATS[:, i] for i in range(4))


def of_words(body, words=1):
    return execute(body, WORDS, words, programs=2).outputs


def of_floats(body, words=1):
    return execute(body, FLOATS, words, programs=2).outputs


def same(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    if expected.dtype.kind == "f":
        found = found.view(expected.dtype)
        assert ((found == expected) | (np.isnan(found) & np.isnan(expected))).all(), (found, expected)
    else:
        assert (found.view(expected.dtype) == expected).all(), (found, expected)


def wide(a):
    return a.astype(np.int64)


def shifted(a, by, left, signed=False):
    out = []
    for x, n in zip(a.tolist(), by.tolist(), strict=True):
        n = min(n, 64)
        out.append((x << n if left else x >> n) & 0xFFFFFFFF)
    return np.array(out, np.uint32)


def field(x, start, length, signed):
    start, length = min(start & 255, 32), min(length & 255, 32)
    bits = [(x >> min(start + i, 31 if signed else 63)) & 1 for i in range(length)]
    value = sum(bit << i for i, bit in enumerate(bits))
    return (value - (1 << length) if signed and length and bits[-1] else value) & 0xFFFFFFFF


def fields(bits, signed):
    rows = zip(bits.tolist(), B.tolist(), C.tolist(), strict=True)
    return np.array([field(x, start, length, signed) for x, start, length in rows], np.uint32)


def quotients(a, b):
    signs = [1 if (x < 0) == (y < 0) else -1 for x, y in zip(a, b, strict=True)]
    return np.array([abs(x) // abs(y) * s & 0xFFFFFFFF for x, y, s in zip(a, b, signs, strict=True)], np.uint32)


INTEGERS = {
    "add.s32 %r100, %r0, %r1;": A + B,
    "sub.s32 %r100, %r0, %r1;": A - B,
    "mul.lo.s32 %r100, %r0, %r1;": A * B,
    "mad.lo.s32 %r100, %r0, %r1, %r2;": A * B + C,
    "mul.hi.u32 %r100, %r0, %r1;": (A.astype(np.uint64) * B >> np.uint64(32)).astype(np.uint32),
    "mul.hi.s32 %r100, %r0, %r1;": (wide(SA) * SB >> 32).astype(np.int32),
    "min.s32 %r100, %r0, %r1;": np.minimum(SA, SB),
    "max.u32 %r100, %r0, %r1;": np.maximum(A, B),
    "neg.s32 %r100, %r0;": -SA,
    "and.b32 %r100, %r0, %r1;": A & B,
    "or.b32 %r100, %r0, %r1;": A | B,
    "xor.b32 %r100, %r0, %r1;": A ^ B,
    "not.b32 %r100, %r0;": ~A,
    "and.b32 %r6, %r1, 63; shl.b32 %r100, %r0, %r6;": shifted(A, B & 63, True),
    "and.b32 %r6, %r1, 63; shr.u32 %r100, %r0, %r6;": shifted(A, B & 63, False),
    "and.b32 %r6, %r1, 63; shr.s32 %r100, %r0, %r6;": shifted(wide(SA), B & 63, False),
    "lop3.b32 %r100, %r0, %r1, %r2, 0xE8;": (A & B) | (A & C) | (B & C),
    "popc.b32 %r100, %r0;": np.array([int(x).bit_count() for x in A], np.uint32),
    "clz.b32 %r100, %r0;": np.array([32 - int(x).bit_length() for x in A], np.uint32),
    "bfe.u32 %r100, %r0, %r1, %r2;": fields(A, False),
    "bfe.s32 %r100, %r0, %r1, %r2;": fields(SA, True),
    "bfi.b32 %r100, %r0, %r1, 5, 9;": (B & ~np.uint32(0x1FF << 5)) | ((A & 0x1FF) << np.uint32(5)),
    "prmt.b32 %r100, %r0, %r1, 0x5410;": (A & 0xFFFF) | (B << np.uint32(16)),
    "prmt.b32 %r100, %r0, %r1, 0x7632;": (A >> np.uint32(16)) | (B & np.uint32(0xFFFF0000)),
    "prmt.b32 %r100, %r0, %r1, 0xBBB3;": (A >> np.uint32(24)) | np.where(SA < 0, np.uint32(0xFFFFFF00), np.uint32(0)),
    "shf.l.wrap.b32 %r100, %r0, %r1, 7;": (B << np.uint32(7)) | (A >> np.uint32(25)),
    "shf.r.wrap.b32 %r100, %r0, %r1, 7;": (A >> np.uint32(7)) | (B << np.uint32(25)),
    "or.b32 %r6, %r1, 1; div.s32 %r100, %r0, %r6;": quotients(SA.tolist(), (SB | 1).tolist()),
    "or.b32 %r6, %r1, 1; rem.u32 %r100, %r0, %r6;": A % (B | np.uint32(1)),
    "cvt.u16.u32 %rs1, %r0; cvt.u32.u16 %r100, %rs1;": A & 0xFFFF,
    "cvt.u16.u32 %rs1, %r0; cvt.s32.s16 %r100, %rs1;": A.astype(np.uint16).view(np.int16).astype(np.int32),
    "mov.b32 {%rs1, %rs2}, %r0; mov.b32 %r100, {%rs2, %rs1};": (A >> np.uint32(16)) | (A << np.uint32(16)),
    "cvt.rn.f32.s32 %r100, %r0;": SA.astype(np.float32),
    "cvt.rn.f32.u32 %r100, %r0;": A.astype(np.float32),
    "setp.lt.s32 %p1, %r0, %r1; selp.b32 %r100, 1, 2, %p1;": np.where(SA < SB, 1, 2).astype(np.uint32),
    "setp.lt.u32 %p1, %r0, %r1; selp.b32 %r100, 1, 2, %p1;": np.where(A < B, 1, 2).astype(np.uint32),
    "setp.ge.and.s32 %p1, %r0, %r1, 0; selp.b32 %r100, 1, 2, %p1;": np.full(64, 2, np.uint32),
}  # fmt: skip


@pytest.mark.parametrize("body", INTEGERS, ids=lambda body: body.split(" %r100")[0].split("; ")[-1])
def test_integers(body):
    same(of_words(body)[:, 0], INTEGERS[body])


def test_products_of_twice_the_width():
    found = of_words("mul.wide.s32 %rd1, %r0, %r1; mov.b64 {%r100, %r101}, %rd1;", 2)
    same(found.view(np.int64)[:, 0], wide(SA) * SB)
    found = of_words("cvt.u64.u32 %rd2, %r2; mad.wide.u32 %rd1, %r0, %r1, %rd2; mov.b64 {%r100, %r101}, %rd1;", 2)
    same(found.view(np.uint64)[:, 0], A.astype(np.uint64) * B + C)


with np.errstate(all="ignore"):
    F32 = {
        "add.f32 %r100, %r0, %r1;": FA + FB,
        "sub.f32 %r100, %r0, %r1;": FA - FB,
        "mul.f32 %r100, %r0, %r1;": FA * FB,
        "div.full.f32 %r100, %r0, %r1;": FA / FB,
        "fma.rn.f32 %r100, %r0, %r1, %r2;": (FA.astype(np.longdouble) * FB + FC).astype(np.float32),
        "neg.f32 %r100, %r0;": -FA,
        "abs.f32 %r100, %r0;": np.abs(FA),
        "max.f32 %r100, %r0, %r1;": np.fmax(FA, FB),
        "min.f32 %r100, %r0, %r1;": np.fmin(FA, FB),
        "max.NaN.f32 %r100, %r0, %r1;": np.maximum(FA, FB),
        "max.f32 %r100, %r0, %r1, %r2;": np.fmax(np.fmax(FA, FB), FC),
        "min.NaN.f32 %r100, %r0, %r1, %r2;": np.minimum(np.minimum(FA, FB), FC),
        "cvt.rn.f16.f32 %rs1, %r0; add.rn.f32.f16 %r100, %rs1, %r1;": FA.astype(np.float16) + FB,
        "cvt.rn.f16.f32 %rs1, %r0; sub.rn.f32.f16 %r100, %rs1, %r1;": FA.astype(np.float16) - FB,
        "cvt.rn.bf16.f32 %rs1, %r0; sub.f32.bf16 %r100, %rs1, %r1;": from_bf16(to_bf16(FA)) - FB,
        "cvt.rn.bf16.f32 %rs1, %r0; cvt.rn.bf16.f32 %rs2, %r1; fma.rn.f32.bf16 %r100, %rs1, %rs2, %r2;": (
            from_bf16(to_bf16(FA)).astype(np.longdouble) * from_bf16(to_bf16(FB)) + FC
        ).astype(np.float32),
        "ex2.approx.f32 %r100, %r0;": np.exp2(FA.astype(np.float64)).astype(np.float32),
        "rsqrt.approx.ftz.f32 %r100, %r0;": np.where(
            np.abs(FA) < 1.2e-38, np.inf * np.copysign(1, FA), 1 / np.sqrt(FA.astype(np.float64))
        ).astype(np.float32),
        "mul.ftz.f32 %r100, %r0, %r1;": np.where(np.abs(FA) < 1.2e-38, FA * 0 * FB, FA * FB),
        "cvt.rn.f16.f32 %rs1, %r0; cvt.f32.f16 %r100, %rs1;": FA.astype(np.float16).astype(np.float32),
        "cvt.rna.tf32.f32 %r100, %r0;": to_tf32(FA, ties_away=True),
        "cvt.rzi.s32.f32 %r6, %r2; cvt.rn.f32.s32 %r100, %r6;": np.trunc(FC),
        "setp.neu.f32 %p1, %r0, %r1; selp.f32 %r100, %r0, %r1, %p1;": np.where(FA == FB, FB, FA),
        "setp.num.f32 %p1, %r0, %r0; selp.f32 %r100, %r0, 0f40000000, %p1;": np.where(np.isnan(FA), np.float32(2), FA),
    }


@pytest.mark.parametrize("body", F32, ids=lambda body: body.split("; ")[0].split(" %")[0] + body[-14:])
def test_float32(body):
    same(of_floats(body)[:, 0], F32[body])


@pytest.mark.parametrize(
    "one",
    ["min.s32 %r100, %r0, %r1, %r2", "mul.f32 %r100, %r0", "max.bf16x2 %r100, %r0, %r1, %r2", "fma.rn.f32 %r1, %r0"],
)
def test_an_operand_too_many_or_too_few_is_no_guess(one):
    """numpy takes a third number for the place of its result: a maximum of three was one of two, and no word."""
    with pytest.raises(UnknownPtx, match=re.escape(one)):
        of_floats(f"{one};")


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_16_bit_floats_round_as_pytorch_does(kind):
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    x = torch.from_numpy(FLOATS)
    a, b, c = (x[:, i].to(dtype) for i in range(3))
    pairs = {
        "add": (a + b, c + b),
        "mul": (a * b, c * b),
        "fma.rn": tuple((u.double() * v.double() + w.double()).to(dtype) for u, v, w in ((a, b, c), (c, b, a))),
    }
    packs = [f"cvt.rn.{kind}x2.f32 %r{10 + i}, %r{(2, 1, 0)[i]}, %r{i};" for i in range(3)]  # upper, lower
    for name, (low, high) in pairs.items():
        third = ", %r12" if name == "fma.rn" else ""
        found = of_floats(" ".join([*packs, f"{name}.{kind}x2 %r100, %r10, %r11{third};"]))[:, 0]
        for bits, expected in ((found & 0xFFFF, low), (found >> np.uint32(16), high)):
            got = torch.from_numpy(bits.astype(np.uint16).view(np.int16).copy()).view(dtype)
            assert ((got == expected) | (got.isnan() & expected.isnan())).all(), name


def test_formats_round_as_pytorch_does():
    bits = RNG.integers(0, 1 << 32, 4000, dtype=np.uint32)
    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    same(from_bf16(to_bf16(values)), expected)
    tf32 = to_tf32(values)
    finite = np.isfinite(values) & (np.abs(values) > 1e-30) & (np.abs(values) < 1e38)
    assert (np.abs(tf32[finite] - values[finite]) <= np.abs(values[finite]) * 2.0**-11).all()
    assert not (tf32.view(np.uint32)[np.isfinite(values)] & 0x1FFF).any()


# ------------------------------------------------------------------------------------------------------------- the warp

LANE = np.arange(64)
SHUFFLES = {
    "bfly.b32 %r100, %r0, 4, 31, -1": (LANE // 32 * 32) + (LANE % 32 ^ 4),
    "up.b32 %r100, %r0, 3, 0, -1": np.where(LANE % 32 >= 3, LANE - 3, LANE),
    "down.b32 %r100, %r0, 3, 31, -1": np.where(LANE % 32 + 3 <= 31, LANE + 3, LANE),
    "idx.b32 %r100, %r0, 9, 31, -1": LANE // 32 * 32 + 9,
    "up.b32 %r100, %r0, 1, 0x1800, -1": np.where(LANE % 8 >= 1, LANE - 1, LANE),
    "idx.b32 %r100, %r0, 1, 0x1c1f, -1": LANE // 4 * 4 + 1,
}


@pytest.mark.parametrize("rest", SHUFFLES)
def test_shuffles(rest):
    same(of_words(f"shfl.sync.{rest};")[:, 0], A[SHUFFLES[rest]])


def test_a_shuffle_from_a_lane_that_takes_no_part_is_found():
    body = "mov.b32 %r100, 0; setp.lt.s32 %p1, %r190, 8; @%p1 shfl.sync.bfly.b32 %r100, %r0, {}, 31, -1;"
    assert execute(body.format(4), WORDS, programs=2).kinds == []
    assert execute(body.format(8), WORDS, programs=2).kinds == ["a shuffle reads a lane that takes no part"]


def test_reductions():
    same(of_words("redux.sync.add.s32 %r100, %r0, -1;")[:, 0], np.repeat(A.reshape(2, 32).sum(1, dtype=np.uint32), 32))
    same(of_words("redux.sync.min.s32 %r100, %r0, -1;")[:, 0], np.repeat(SA.reshape(2, 32).min(1), 32))


# --------------------------------------------------------------------------------------------------------------- matrices


def fragments(matrix, rows, columns):
    """(32, n) uint32 of a (M, N) matrix: register r of lane l holds (rows(r, l), columns(r, l)), or that and the next."""
    out = []
    for lane in range(32):
        words = []
        for r in range(len(rows)):
            i, j = rows[r](lane), columns[r](lane)
            if matrix.itemsize == 4:
                words.append(matrix[i, j].view(np.uint32))
            else:
                words.append(
                    np.uint32(matrix[i, j].view(np.uint16))
                    | np.uint32(matrix[i, j + 1].view(np.uint16)) << np.uint32(16)
                )
        out.append(words)
    return np.array(out, np.uint32)


def c_fragment(found):
    D = np.zeros((16, 8), np.float32)
    for lane in range(32):
        for r in range(4):
            D[lane // 4 + 8 * (r // 2), lane % 4 * 2 + r % 2] = found[lane, r]
    return D


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_mma_multiplies_matrices(kind):
    k = 8 if kind == "tf32" else 16
    a, b = RNG.standard_normal((16, k)).astype(np.float32), RNG.standard_normal((k, 8)).astype(np.float32)
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    half = (lambda i: i // 4), (lambda i: i // 4 + 8)
    if kind == "tf32":
        values = [(x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b)]
        fa = fragments(a, [half[0], half[1]] * 2, [lambda i: i % 4] * 2 + [lambda i: i % 4 + 4] * 2)
        fb = fragments(b, [lambda i: i % 4, lambda i: i % 4 + 4], [lambda i: i // 4] * 2)
    else:
        bits = [x.astype(np.float16).view(np.uint16) if kind == "f16" else to_bf16(x) for x in (a, b)]
        values = [x.view(np.float16).astype(np.float32) if kind == "f16" else from_bf16(x) for x in bits]
        fa = fragments(bits[0], [half[0], half[1]] * 2, [lambda i: i % 4 * 2] * 2 + [lambda i: i % 4 * 2 + 8] * 2)
        turned = np.ascontiguousarray(bits[1].T)  # B's pairs run along k
        fb = fragments(turned, [lambda i: i // 4] * 2, [lambda i: i % 4 * 2, lambda i: i % 4 * 2 + 8])
    fc = fragments(c, [half[0], half[0], half[1], half[1]], [lambda i: i % 4 * 2, lambda i: i % 4 * 2 + 1] * 2)
    names = [f"%r{i}" for i in range(10)]
    body = (
        f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%r100, %r101, %r102, %r103}}, "
        f"{{{', '.join(names[:4])}}}, {{{', '.join(names[4:6])}}}, {{{', '.join(names[6:])}}};"
    )
    ran = execute(body, np.concatenate([fa, fb, fc], 1), 4)
    expected = values[0].astype(np.float64) @ values[1].astype(np.float64) + c
    same(c_fragment(ran.outputs.view(np.float32)), expected.astype(np.float32))
    assert ran.record.matmuls() == {"mma.sync": 1}


@pytest.mark.parametrize("turned", ["", ".trans"])
def test_ldmatrix_and_stmatrix_move_tiles(turned):
    store = "shl.b32 %r20, %r190, 4; st.shared.v4.b32 [%r20], {%r0, %r1, %r2, %r3};"
    tiles = WORDS[:32].view(np.uint16).reshape(4, 8, 8)
    tiles = tiles.transpose(0, 2, 1) if turned else tiles
    expected = np.ascontiguousarray(tiles).reshape(4, 32, 2).view(np.uint32)[..., 0].T
    load = f"ldmatrix.sync.aligned.m8n8.x4{turned}.shared.b16 {{%r100, %r101, %r102, %r103}}, [%r20];"
    ran = execute(f"{store} {load}", WORDS[:32], 4, shared=512)
    same(ran.outputs, expected)
    back = f"stmatrix.sync.aligned.m8n8.x4{turned}.shared.b16 [%r20], {{%r100, %r101, %r102, %r103}};"
    again = f"{store} {load} {back} ld.shared.v4.b32 {{%r100, %r101, %r102, %r103}}, [%r20];"
    same(execute(again, WORDS[:32], 4, shared=512).outputs, WORDS[:32])


def wgmma_body(after="", wait="wgmma.wait_group.sync.aligned 0;", fence="fence.proxy.async.shared::cta; bar.sync 0;"):
    """A (64 x 16) at byte 0 and B (8 x 16) at byte 2048 of shared memory, 16 bits, no swizzle: 8 x 8 tiles of 128 bytes."""
    lines = ["shl.b32 %r20, %r190, 4; st.shared.v4.b32 [%r20], {%r0, %r1, %r2, %r3};"]
    lines += ["setp.lt.s32 %p2, %r190, 16; @%p2 st.shared.v4.b32 [%r20+2048], {%r4, %r5, %r6, %r7};", fence]
    # leading: 128 bytes to the next 8 columns; stride: 256 bytes to the next 8 rows; both in units of 16.
    a, b = ((16 << 32) + (8 << 16) + (start >> 4) for start in (0, 2048))
    lines += [f"mov.b64 %rd1, {a}; mov.b64 %rd2, {b}; wgmma.fence.sync.aligned;"]
    lines += [
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r100,%r101,%r102,%r103}, %rd1, %rd2, 0, 1, 1, 0, 0;"
    ]
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;", after, wait])


def wgmma_inputs():
    a, b = to_bf16(RNG.standard_normal((64, 16))), to_bf16(RNG.standard_normal((8, 16)))

    def tiles(x):  # thread t holds row t % 8 of tile t // 8; tiles of 8 columns first
        return x.reshape(-1, 8, 2, 8).transpose(0, 2, 1, 3).reshape(-1, 8)

    words = np.zeros((128, 8), np.uint32)
    words[:, :4] = np.ascontiguousarray(tiles(a)).view(np.uint32)
    words[:16, 4:] = np.ascontiguousarray(tiles(b)).view(np.uint32)
    return words, from_bf16(a).astype(np.float64) @ from_bf16(b).astype(np.float64).T


def test_wgmma_multiplies_what_its_descriptors_name():
    words, expected = wgmma_inputs()
    ran = execute(wgmma_body(), words, 4, threads=128, shared=2304)
    found = np.zeros((64, 8), np.float32)
    for t in range(128):
        for r in range(4):
            found[16 * (t // 32) + t % 32 // 4 + 8 * (r // 2), t % 4 * 2 + r % 2] = ran.outputs[t, r].view(np.float32)
    same(found, expected.astype(np.float32))
    assert ran.kinds == [] and ran.record.matmuls() == {"wgmma.mma_async": 4}


@pytest.mark.parametrize(
    "change, kind",
    [
        ({"wait": ""}, "a matmul's result is read before its wait"),
        ({"wait": "wgmma.wait_group.sync.aligned 1;"}, "a matmul's result is read before its wait"),
        ({"fence": "bar.sync 0;"}, "a matmul reads what no fence made visible to it"),
        ({"fence": "fence.proxy.async.shared::cta;"}, "two warps, no barrier: a read of what another wrote"),
        ({"after": "bar.sync 0; st.shared.b32 [%r20], %r0;"}, "a matmul's operand is overwritten before its wait"),
    ],
)
def test_a_matmul_without_its_wait_fence_or_barrier_is_found(change, kind):
    words, _ = wgmma_inputs()
    assert kind in execute(wgmma_body(**change), words, 4, threads=128, shared=2304).kinds


@pytest.mark.parametrize("mode, width", [(1, 128), (2, 64), (3, 32)])
@pytest.mark.parametrize("turned", [False, True])
def test_swizzled_operands_are_each_byte_once(mode, width, turned):
    from minimind_fast.proof.ptx.instructions.wgmma import element_addresses

    rows = 64
    descriptor = (mode << 62) + ((8 * width >> 4) << 32) + ((rows * 16 * 2 >> 4) << 16)
    at = element_addresses(descriptor, rows, 16, turned)
    assert len(np.unique(at)) == rows * 16
    # Within an atom of eight rows the 16-byte piece is xored with the row, or the upper part of it.
    line = np.arange(8) * width
    pieces = at[:, 0] if not turned else at[0, :]
    expected = line ^ ((line >> 7 & width // 16 - 1) << 4)
    assert (pieces[:8] == expected).all()
