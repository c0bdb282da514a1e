// What all shaders share: the call block, streams, elements and their conversion, exponentials and logarithms.
//
// Every number is an f32 that a shader can tell from the others: no infinity and no NaN is ever made or compared, since WGSL may take neither
// to occur. What can be empty is found by counting keys.

struct Tensor {
    offset: u32,      // element of the binding at which (0, 0, 0, 0, 0) lies
    batch: u32,       // strides in elements
    block: u32,
    row: u32,
    head: u32,
    blocks: u32,      // size of the axis blocks: entries
    rows: u32,        // size of the axis rows
    dtype: u32,
}

// A stream's part of the call, see `call.rs`.
struct Stream {
    len: u32,
    slot: u32,
    mem_rows: u32,
    mem_entry: u32,
    state_entry: u32,
    blocks: u32,
    in_block: u32,
    first_row: u32,
    before: u32,
    owns_slot: u32,
}

const F32 = 0u;
const F16 = 1u;
const BF16 = 2u;

const TENSORS = 40u;
const STREAMS = 176u;
const STREAM = 10u;

fn size(i: u32) -> u32 {
    return call[i];
}

fn tensor(i: u32) -> Tensor {
    let at = TENSORS + 8u * i;
    return Tensor(call[at], call[at + 1u], call[at + 2u], call[at + 3u], call[at + 4u], call[at + 5u], call[at + 6u], call[at + 7u]);
}

fn stream(n: u32) -> Stream {
    let at = STREAMS + STREAM * n;
    return Stream(
        call[at], call[at + 1u], call[at + 2u], call[at + 3u], call[at + 4u],
        call[at + 5u], call[at + 6u], call[at + 7u], call[at + 8u], call[at + 9u],
    );
}

// One value a head: a sink, or a gate's beta.
fn per_head(at: u32, head: u32) -> f32 {
    return bitcast<f32>(call[at + head]);
}

fn place(t: Tensor, batch: u32, block: u32, row: u32, head: u32) -> u32 {
    return t.offset + batch * t.batch + block * t.block + row * t.row + head * t.head;
}

// Linear number of a workgroup; grids wider than a dimension may be go on in the second.
fn group_number(group: vec3<u32>) -> u32 {
    return group.y * MAX_GROUPS + group.x;
}

// The word that holds element i, and the element out of it.
fn word(dtype: u32, i: u32) -> u32 {
    return select(i >> 1u, i, dtype == F32);
}

fn half(dtype: u32, w: u32, i: u32) -> f32 {
    if (dtype == BF16) {
        return bitcast<f32>(select(w << 16u, w & 0xffff0000u, (i & 1u) == 1u));
    }
    return half_f16(w, i);
}

fn element(dtype: u32, w: u32, i: u32) -> f32 {
    if (dtype == F32) {
        return bitcast<f32>(w);
    }
    return half(dtype, w, i);
}

// Bits of x in 16 bits, to nearest even.
fn narrow(dtype: u32, x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let sign = (bits >> 16u) & 0x8000u;
    let a = bits & 0x7fffffffu;
    if (dtype == BF16) {
        let rounded = (a + 0x7fffu + ((a >> 16u) & 1u)) >> 16u;
        return sign | select(rounded, 0x7fc0u, a > 0x7f800000u);
    }
    if (a >= 0x477ff000u) {
        return sign | select(0x7c00u, 0x7e00u, a > 0x7f800000u);
    }
    if (a < 0x38800000u) {
        return sign | u32(round(bitcast<f32>(a) * 0x1p24f));
    }
    return sign | ((a + 0xfffu + ((a >> 13u) & 1u) - 0x38000000u) >> 13u);
}

// 2^x for x <= 0: Cephes' exp2f. At most 2 ulp on any device, where WGSL's own allows 3 + 2|x|.
fn exp2_negative(x: f32) -> f32 {
    let least = max(x, -150.0);
    let n = round(least);
    let r = least - n;
    var p = 1.535336188319500e-4;
    p = fma(p, r, 1.339887440266574e-3);
    p = fma(p, r, 9.618437357674640e-3);
    p = fma(p, r, 5.550332471162809e-2);
    p = fma(p, r, 2.402264791363012e-1);
    p = fma(p, r, 6.931472028550421e-1);
    p = fma(p, r, 1.0);
    // Below 2^-126 it is 0, as any result there may be.
    return select(p * bitcast<f32>(u32(i32(n) + 127) << 23u), 0.0, n < -126.0);
}

// e^x for x <= 0: Cephes' expf. n ln 2 is taken off in two parts, of which the first is exact. The clamp does nothing but keep compilers from
// making the two one.
fn exp_negative(x: f32) -> f32 {
    let least = max(x, -104.0);
    let n = round(least * 1.44269504088896341);
    let r = fma(n, 2.12194440e-4, clamp(fma(n, -0.693359375, least), -1.0, 1.0));
    var p = 1.9875691500e-4;
    p = fma(p, r, 1.3981999507e-3);
    p = fma(p, r, 8.3334519073e-3);
    p = fma(p, r, 4.1665795894e-2);
    p = fma(p, r, 1.6666665459e-1);
    p = fma(p, r, 5.0000001201e-1);
    let e = fma(p * r, r, r) + 1.0;
    return select(e * bitcast<f32>(u32(i32(n) + 127) << 23u), 0.0, n < -126.0);
}

// ln x for normal x > 0: Cephes' logf.
fn ln(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    var exponent = f32(i32(bits >> 23u) - 126);
    var m = bitcast<f32>((bits & 0x7fffffu) | 0x3f000000u);
    if (m < 0.707106781186547524) {
        exponent -= 1.0;
        m += m;
    }
    m -= 1.0;
    let z = m * m;
    var p = 7.0376836292e-2;
    p = fma(p, m, -1.1514610310e-1);
    p = fma(p, m, 1.1676998740e-1);
    p = fma(p, m, -1.2420140846e-1);
    p = fma(p, m, 1.4249322787e-1);
    p = fma(p, m, -1.6668057665e-1);
    p = fma(p, m, 2.0000714765e-1);
    p = fma(p, m, -2.4999993993e-1);
    p = fma(p, m, 3.3333331174e-1);
    var y = p * m * z;
    y = fma(exponent, -2.12194440e-4, y);
    y = fma(-0.5, z, y);
    return fma(exponent, 0.693359375, m + y);
}

// ELU(x) + 1.
fn sigma(x: f32) -> f32 {
    return exp_negative(min(x, 0.0)) + max(x, 0.0);
}
