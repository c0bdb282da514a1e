// f16 by the device's own conversion: where shaders have the type, that is one instruction, and keeps subnormal numbers.

fn half_f16(w: u32, i: u32) -> f32 {
    return unpack2x16float(w)[i & 1u];
}
