// f16 by its bits, where the device has no such type.

fn half_f16(w: u32, i: u32) -> f32 {
    let h = (w >> (16u * (i & 1u))) & 0xffffu;
    let sign = (h & 0x8000u) << 16u;
    let magnitude = h & 0x7fffu;
    // Subnormal numbers by a product, since conversions may take them for 0; infinities and NaN have the next larger exponent.
    let subnormal = bitcast<u32>(f32(magnitude) * 0x1p-24f);
    let bias = select(0x38000000u, 0x70000000u, magnitude >= 0x7c00u);
    return bitcast<f32>(sign | select((magnitude << 13u) + bias, subnormal, magnitude < 0x400u));
}
