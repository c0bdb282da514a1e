// What a device can do at most, as the kernels use it. See `probe.rs`.

@group(1) @binding(0) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    // Values that no compiler knows: the call block is zeros.
    let zero = f32(size(Batch));
    var a = vec4(zero, zero + 0.25, zero + 0.5, zero + 0.75) + f32(local);
    var b = a + 1.0;
    var c = a + 2.0;
    var d = a + 3.0;
    if (EXPONENTIALS) {
        for (var i = 0u; i < ROUNDS; i++) {
            a = -vec4(exp2_negative(a.x), exp2_negative(a.y), exp2_negative(a.z), exp2_negative(a.w));
            b = -vec4(exp2_negative(b.x), exp2_negative(b.y), exp2_negative(b.z), exp2_negative(b.w));
        }
    } else {
        var e = a + 4.0;
        var f = a + 5.0;
        var g = a + 6.0;
        var h = a + 7.0;
        let x = vec4(zero + 0.999);
        for (var i = 0u; i < ROUNDS; i++) {
            a = fma(a, x, x);
            b = fma(b, x, x);
            c = fma(c, x, x);
            d = fma(d, x, x);
            e = fma(e, x, x);
            f = fma(f, x, x);
            g = fma(g, x, x);
            h = fma(h, x, x);
        }
        a += e + f + g + h;
    }
    let sum = a + b + c + d;
    if (sum.x + sum.y + sum.z + sum.w == 0.123) {
        out[group_number(group) % 64u] = sum.x;
    }
}
